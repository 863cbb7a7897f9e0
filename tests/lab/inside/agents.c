/* The guest agents: one real qemu-ga for each virtio port whose name says guest_agent, each with a
 * state of its own. */
#define _GNU_SOURCE
#include "lab.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct agent {
    char port[64], device[64], state[32];
    pid_t pid;
    bool stopped;
};

static struct agent agents[MAX_AGENTS];
static int agent_count;

static void find_ports(void)
{
    DIR *ports = opendir("/sys/class/virtio-ports");
    struct dirent *entry;
    while (ports && (entry = readdir(ports)) && agent_count < MAX_AGENTS) {
        char path[300], name[64] = "";
        bool known = false;
        snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
        FILE *file = fopen(path, "re");
        if (!file)
            continue;
        if (fscanf(file, "%63s", name) != 1)
            name[0] = 0;
        fclose(file);
        for (int i = 0; i < agent_count; i++)
            known |= !strcmp(agents[i].port, name);
        if (known || !strstr(name, "guest_agent"))
            continue;
        struct agent *agent = &agents[agent_count];
        snprintf(agent->port, sizeof agent->port, "%s", name);
        snprintf(agent->device, sizeof agent->device, "/dev/%.50s", entry->d_name);
        snprintf(agent->state, sizeof agent->state, "/run/agent%d", agent_count++);
        mkdir(agent->state, 0755);
    }
    if (ports)
        closedir(ports);
}

void agents_start(void)
{
    find_ports();
    for (int i = 0; i < agent_count; i++) {
        struct agent *agent = &agents[i];
        if (agent->pid)
            continue;
        agent->stopped = false;
        agent->pid = fork();
        if (agent->pid == 0) {
            sigset_t none;
            sigemptyset(&none); /* PID 1 blocks them for its signalfd; exec would hand that on */
            sigprocmask(SIG_SETMASK, &none, NULL);
            execl("/usr/sbin/qemu-ga", "qemu-ga", "-m", "virtio-serial", "-p", agent->device, "-t",
                  agent->state, (char *)NULL);
            _exit(127);
        }
        if (agent->pid < 0)
            agent->pid = 0;
    }
}

void agents_reaped(int pid)
{
    for (int i = 0; i < agent_count; i++)
        if (agents[i].pid == pid)
            agents[i].pid = 0;
}

int agents_signal(const char *port, int signal, char *reply)
{
    int reached = 0;
    for (int i = 0; i < agent_count; i++) {
        struct agent *agent = &agents[i];
        if (!agent->pid || (*port && strcmp(port, agent->port)))
            continue;
        if (kill(agent->pid, signal))
            return fail(reply, "kill");
        agent->stopped = signal == SIGSTOP || (agent->stopped && signal != SIGCONT);
        reached++;
    }
    snprintf(reply, REPLY_SIZE, reached ? "{\"agents\":%d}" : "no agent runs there", reached);
    return reached ? 0 : -1;
}

void agents_list(char *json, size_t size)
{
    size_t used = append(json, size, 0, "{");
    for (int i = 0; i < agent_count; i++) {
        struct agent *agent = &agents[i];
        char frozen[64];
        /* qemu-ga keeps this file while it believes the guest frozen, also over its own death. */
        snprintf(frozen, sizeof frozen, "%s/qga.state.isfrozen", agent->state);
        used = append(json, size, used, "%s\"%s\":{\"pid\":%d,\"stopped\":%s,\"frozen\":%s}",
                      i ? "," : "", agent->port, agent->pid, agent->stopped ? "true" : "false",
                      access(frozen, F_OK) ? "false" : "true");
    }
    append(json, size, used, "}");
}
