/* PID 1 of the lab's guest: starts the rest and answers the host's lines "ID COMMAND ARGUMENTS"
 * with "ID ok JSON" or "ID error REASON". The loop itself never touches a disk: what may block runs
 * in a thread that answers later. */
#define _GNU_SOURCE
#include "lab.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/input.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CONTROL_PORT "org.example.lab.0"
#define PULSE_PORT "org.example.lab.pulse.0"

static int control = -1, pulse_port = -1;
static pthread_mutex_t answering = PTHREAD_MUTEX_INITIALIZER;

uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

size_t append(char *text, size_t size, size_t used, const char *format, ...)
{
    va_list arguments;
    if (used >= size)
        return used;
    va_start(arguments, format);
    int length = vsnprintf(text + used, size - used, format, arguments);
    va_end(arguments);
    return used + (size_t)length;
}

int fail(char *reply, const char *what)
{
    snprintf(reply, REPLY_SIZE, "%.64s: %s", what, strerror(errno));
    return -1;
}

/* One byte to the host for each completed write, dropped if nobody listens. The guest's own clock
 * stands still while its vCPUs are stopped, so only the host can see how long that was. */
void pulse(char disk)
{
    if (pulse_port >= 0 && write(pulse_port, &disk, 1) < 0)
        return;
}

static void answer(const char *id, int result, const char *reply)
{
    char line[REPLY_SIZE + 64];
    const char *body = *reply ? reply : "{}";
    size_t length = append(line, sizeof line, 0, "%s %s %s\n", id, result ? "error" : "ok", body);
    size_t sent = 0;
    pthread_mutex_lock(&answering);
    for (int tries = 0; sent < length && tries < 100; tries++) { /* the host may have left */
        ssize_t part = write(control, line + sent, length - sent);
        if (part > 0)
            sent += (size_t)part;
        else
            usleep(10000);
    }
    pthread_mutex_unlock(&answering);
}

static void *leave(void *unused)
{
    (void)unused;
    char ignored[REPLY_SIZE];
    agents_signal("", SIGKILL, ignored);
    disks_leave();
    reboot(RB_POWER_OFF);
    return NULL;
}

static void *leave_late(void *unused)
{
    (void)unused;
    sleep(10);
    reboot(RB_POWER_OFF);
    return NULL;
}

static void in_thread(void *(*run)(void *), void *argument)
{
    pthread_t thread;
    if (!pthread_create(&thread, NULL, run, argument))
        pthread_detach(thread);
}

static void power_off(void)
{
    in_thread(leave, NULL);
    in_thread(leave_late, NULL); /* a disk that does not let go must not keep the guest alive */
}

struct order {
    char id[16], command[32], disk[32], file[64], text[1024];
};

static void *obey(void *argument)
{
    struct order *order = argument;
    char reply[REPLY_SIZE] = "";
    int result = -1;
    const char *command = order->command;
    if (!strcmp(command, "sync"))
        sync(), result = 0;
    else if (!strcmp(command, "mount"))
        result = disk_mount(order->disk, reply);
    else if (!strcmp(command, "umount"))
        result = disk_umount(order->disk, reply);
    else if (!strcmp(command, "hold-freeze"))
        result = disk_hold_freeze(order->disk, reply);
    else if (!strcmp(command, "release-freeze"))
        result = disk_release_freeze(order->disk, reply);
    else if (!strcmp(command, "bad-mount"))
        result = disk_bad_mount(order->disk, reply);
    else if (!strcmp(command, "good-mount"))
        result = disk_good_mount(order->disk, reply);
    else if (!strcmp(command, "write"))
        result = disk_write(order->disk, order->file, order->text, reply);
    else if (!strcmp(command, "read"))
        result = disk_read(order->disk, order->file, reply);
    else if (!strcmp(command, "fill"))
        result = disk_fill(order->disk, order->file, (unsigned)atoi(order->text), reply);
    else
        snprintf(reply, sizeof reply, "unknown command %s", command);
    answer(order->id, result, reply);
    free(order);
    return NULL;
}

static void handle(const char *line)
{
    struct order order = {0};
    char reply[REPLY_SIZE] = "";
    int result = 0;
    if (sscanf(line, "%15s %31s %31s %63s %1023[^\n]", order.id, order.command, order.disk,
               order.file, order.text) < 2)
        return;
    const char *command = order.command, *word = order.disk;
    if (!strcmp(command, "ping"))
        ;
    else if (!strcmp(command, "stall"))
        disks_stalls(reply, sizeof reply);
    else if (!strcmp(command, "reset"))
        disks_reset();
    else if (!strcmp(command, "writer"))
        disks_set_writing(!strcmp(word, "on"));
    else if (!strcmp(command, "pause"))
        disks_set_pause((unsigned)atoi(word));
    else if (!strcmp(command, "agents"))
        agents_list(reply, sizeof reply);
    else if (!strcmp(command, "stop-agent"))
        result = agents_signal(word, SIGSTOP, reply);
    else if (!strcmp(command, "cont-agent"))
        result = agents_signal(word, SIGCONT, reply);
    else if (!strcmp(command, "kill-agent"))
        result = agents_signal(word, SIGKILL, reply);
    else if (!strcmp(command, "start-agent"))
        agents_start();
    else if (!strcmp(command, "poweroff"))
        power_off();
    else {
        struct order *copy = malloc(sizeof order);
        if (copy) {
            *copy = order;
            in_thread(obey, copy);
            return;
        }
        result = fail(reply, "malloc");
    }
    answer(order.id, result, reply);
}

static int open_port(const char *wanted)
{
    DIR *ports = opendir("/sys/class/virtio-ports");
    struct dirent *entry;
    int fd = -1;
    while (ports && fd < 0 && (entry = readdir(ports))) {
        char path[300], name[64] = "";
        snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
        FILE *file = fopen(path, "re");
        if (file && fscanf(file, "%63s", name) == 1 && !strcmp(name, wanted)) {
            snprintf(path, sizeof path, "/dev/%s", entry->d_name);
            fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
        }
        if (file)
            fclose(file);
    }
    if (ports)
        closedir(ports);
    return fd;
}

/* The ACPI power button, so that virsh shutdown works for a guest without an agent too. */
static void *watch_button(void *argument)
{
    struct input_event event;
    int fd = open(argument, O_RDONLY | O_CLOEXEC);
    while (fd >= 0 && read(fd, &event, sizeof event) == sizeof event)
        if (event.type == EV_KEY && event.code == KEY_POWER && event.value == 1)
            power_off();
    return NULL;
}

static void read_control(void)
{
    static char buffer[4096];
    static size_t used;
    ssize_t length = read(control, buffer + used, sizeof buffer - 1 - used);
    if (length <= 0) {
        used = 0; /* the host hung up: half a line of one connection is no start for the next */
        usleep(10000);
        return;
    }
    used += (size_t)length;
    buffer[used] = 0;
    for (char *end; (end = strchr(buffer, '\n'));) {
        *end = 0;
        handle(buffer);
        used -= (size_t)(end + 1 - buffer);
        memmove(buffer, end + 1, used + 1);
    }
    if (used == sizeof buffer - 1)
        used = 0;
}

/* What a state that is to be restored for others is saved of: all is up, and no disk known yet. */
static bool asked_to_wait(void)
{
    char line[4096] = "";
    FILE *file = fopen("/proc/cmdline", "re");
    bool wait = file && fgets(line, sizeof line, file) && strstr(line, "lab.wait");
    if (file)
        fclose(file);
    return wait;
}

/* Until the host says how long the writers are to pause; the next lines stay for read_control. */
static void wait_for_disks(void)
{
    char line[16] = "";
    size_t used = 0;
    puts("guestd: waits");
    fflush(stdout);
    while (!strchr(line, '\n') && used < sizeof line - 1) {
        ssize_t length = read(control, line + used, 1);
        if (length > 0)
            used += (size_t)length;
        else
            usleep(5000); /* nothing was said, or no host is there: they look alike */
    }
    disks_set_pause((unsigned)atoi(line));
    int module = open("/modules/virtio_blk.ko", O_RDONLY | O_CLOEXEC);
    if (module < 0 || syscall(SYS_finit_module, module, "", 0))
        perror("guestd: virtio_blk");
    close(module);
}

int main(void)
{
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGCHLD);
    sigaddset(&signals, SIGTERM); /* /sbin/shutdown, which qemu-ga runs, is a kill -TERM 1 */
    sigprocmask(SIG_BLOCK, &signals, NULL);
    int signal_fd = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
    control = open_port(CONTROL_PORT);
    if (asked_to_wait()) {
        agents_start();
        sleep(2); /* so long they take to start, or they do so after all */
        wait_for_disks();
    }
    pulse_port = open_port(PULSE_PORT);
    disks_mount_all();
    agents_start();
    in_thread(watch_button, "/dev/input/event0");
    in_thread(watch_button, "/dev/input/event1");
    struct pollfd sources[] = {{.fd = signal_fd, .events = POLLIN},
                               {.fd = control, .events = POLLIN}};
    for (;;) {
        poll(sources, 2, -1);
        struct signalfd_siginfo signal;
        while (read(signal_fd, &signal, sizeof signal) == sizeof signal)
            if (signal.ssi_signo == SIGTERM)
                power_off();
        for (int pid; (pid = waitpid(-1, NULL, WNOHANG)) > 0;)
            agents_reaped(pid);
        if (sources[1].revents)
            read_control();
    }
}
