/* The guest's disks: mounts them, writes to each without pause, and knows the longest time a writer
 * stood still. */
#define _GNU_SOURCE
#include "lab.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define RECORD_SIZE 4096
#define RECORDS 64
#define RING ".lab-ring"

/* The records are read by ring.py from an image on the host: change both together. */
struct record {
    char magic[8];
    uint64_t sequence, monotonic_ns;
    unsigned char fill[RECORD_SIZE - 32];
    uint64_t checksum; /* FNV-1a of all before it */
};

struct disk {
    char name[16], directory[32];
    bool mounted, busy; /* busy: a record is on its way */
    volatile bool stop, failed;
    pthread_t writer;
    pthread_mutex_t lock; /* guards the figures below, but is never held over a write */
    uint64_t last_ns, longest_ns, writes, sequence;
};

static struct disk disks[MAX_DISKS];
static int disk_count;
static volatile bool writing = true;
static volatile unsigned pause_us = 2000;

static struct disk *find(const char *name, char *reply)
{
    for (int i = 0; i < disk_count; i++)
        if (!strcmp(disks[i].name, name))
            return &disks[i];
    snprintf(reply, REPLY_SIZE, "no disk %.32s here", name);
    return NULL;
}

static uint64_t checksum(const void *data, size_t size)
{
    uint64_t sum = 14695981039346656037ULL;
    for (const unsigned char *byte = data; size--; byte++)
        sum = (sum ^ *byte) * 1099511628211ULL;
    return sum;
}

static int write_record(int fd, uint64_t sequence)
{
    struct record record = {.magic = "LABRING", .sequence = sequence, .monotonic_ns = now_ns()};
    memset(record.fill, (int)(sequence & 0xff), sizeof record.fill);
    record.checksum = checksum(&record, offsetof(struct record, checksum));
    off_t place = (off_t)(sequence % RECORDS) * RECORD_SIZE;
    if (pwrite(fd, &record, sizeof record, place) != sizeof record)
        return -1;
    return fdatasync(fd);
}

static uint64_t newest_sequence(int fd)
{
    uint64_t newest = 0, seen[3];
    for (int i = 0; i < RECORDS; i++)
        if (pread(fd, seen, sizeof seen, (off_t)i * RECORD_SIZE) == sizeof seen && seen[1] > newest)
            newest = seen[1];
    return newest;
}

static void *write_on(void *argument)
{
    struct disk *disk = argument;
    char path[64];
    snprintf(path, sizeof path, "%s/" RING, disk->directory);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    uint64_t sequence = fd < 0 ? 0 : newest_sequence(fd);
    disk->failed = fd < 0;
    while (!disk->stop && !disk->failed) {
        pthread_mutex_lock(&disk->lock);
        bool active = disk->busy = writing;
        pthread_mutex_unlock(&disk->lock);
        if (active && write_record(fd, ++sequence) < 0)
            disk->failed = true;
        uint64_t now = now_ns();
        pthread_mutex_lock(&disk->lock);
        if (active && !disk->failed) {
            if (now - disk->last_ns > disk->longest_ns)
                disk->longest_ns = now - disk->last_ns;
            disk->writes++;
            disk->sequence = sequence;
            pulse(disk->name[2]);
        }
        disk->last_ns = now;
        disk->busy = false;
        pthread_mutex_unlock(&disk->lock);
        usleep(active ? pause_us : 5000);
    }
    if (disk->failed)
        fprintf(stderr, "guestd: writing to %s: %s\n", path, strerror(errno));
    if (fd >= 0)
        close(fd);
    return NULL;
}

static int mount_device(struct disk *disk)
{
    char device[32];
    snprintf(device, sizeof device, "/dev/%s", disk->name);
    mkdir(disk->directory, 0755);
    if (mount(device, disk->directory, "ext4", MS_NOATIME, NULL) &&
        mount(device, disk->directory, "xfs", MS_NOATIME, NULL))
        return -1;
    disk->mounted = true;
    disk->stop = false;
    disk->last_ns = now_ns();
    return pthread_create(&disk->writer, NULL, write_on, disk);
}

void disks_mount_all(void)
{
    for (char letter = 'a'; letter < 'a' + MAX_DISKS; letter++) {
        struct disk *disk = &disks[disk_count];
        char block[32];
        snprintf(block, sizeof block, "/sys/block/vd%c", letter);
        if (access(block, F_OK))
            continue;
        snprintf(disk->name, sizeof disk->name, "vd%c", letter);
        snprintf(disk->directory, sizeof disk->directory, "/mnt/vd%c", letter);
        pthread_mutex_init(&disk->lock, NULL);
        disk_count++;
        if (mount_device(disk))
            fprintf(stderr, "guestd: %s is not mounted: %s\n", disk->name, strerror(errno));
    }
}

void disks_set_writing(bool on)
{
    writing = on;
    if (on)
        disks_reset(); /* or the time it was off would count as a stall */
}

void disks_set_pause(unsigned microseconds)
{
    pause_us = microseconds;
}

void disks_reset(void)
{
    for (int i = 0; i < disk_count; i++) {
        pthread_mutex_lock(&disks[i].lock);
        disks[i].last_ns = now_ns();
        disks[i].longest_ns = disks[i].writes = 0;
        pthread_mutex_unlock(&disks[i].lock);
    }
}

void disks_stalls(char *json, size_t size)
{
    size_t used = append(json, size, 0, "{");
    for (int i = 0; i < disk_count; i++) {
        struct disk *disk = &disks[i];
        pthread_mutex_lock(&disk->lock);
        /* What still goes on counts too: a frozen guest must not answer "none". */
        uint64_t idle = disk->mounted && writing ? now_ns() - disk->last_ns : 0;
        used = append(json, size, used,
                      "%s\"%s\":{\"longest_ns\":%llu,\"current_ns\":%llu,\"writes\":%llu,"
                      "\"sequence\":%llu,\"mounted\":%s,\"busy\":%s,\"failed\":%s}",
                      i ? "," : "", disk->name,
                      (unsigned long long)(idle > disk->longest_ns ? idle : disk->longest_ns),
                      (unsigned long long)idle, (unsigned long long)disk->writes,
                      (unsigned long long)disk->sequence, disk->mounted ? "true" : "false",
                      disk->busy ? "true" : "false", disk->failed ? "true" : "false");
        pthread_mutex_unlock(&disk->lock);
    }
    append(json, size, used, "}");
}

int disk_mount(const char *name, char *reply)
{
    struct disk *disk = find(name, reply);
    if (!disk)
        return -1;
    if (!disk->mounted && mount_device(disk))
        return fail(reply, "mount");
    return 0;
}

int disk_umount(const char *name, char *reply)
{
    struct disk *disk = find(name, reply);
    if (!disk)
        return -1;
    if (!disk->mounted)
        return 0;
    disk->stop = true;
    pthread_join(disk->writer, NULL);
    disk->mounted = false;
    if (umount(disk->directory))
        return fail(reply, "umount");
    return 0;
}

const char *disk_directory(const char *name, char *reply)
{
    struct disk *disk = find(name, reply);
    return disk ? disk->directory : NULL;
}

void disks_leave(void)
{
    char ignored[REPLY_SIZE];
    for (int i = 0; i < disk_count; i++) {
        disk_release_freeze(disks[i].name, ignored); /* or the umount below would wait for ever */
        disk_umount(disks[i].name, ignored);
    }
    sync();
}
