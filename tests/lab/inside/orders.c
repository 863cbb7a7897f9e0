/* What the host may have done to a mounted file system: freezing, hiding a mount, reading and
 * writing files. */
#define _GNU_SOURCE
#include "lab.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

static int freeze_ioctl(const char *name, unsigned long request, char *reply)
{
    const char *directory = disk_directory(name, reply);
    if (!directory)
        return -1;
    int fd = open(directory, O_RDONLY | O_CLOEXEC);
    int result = fd < 0 ? -1 : ioctl(fd, request, 0);
    if (result)
        fail(reply, request == FIFREEZE ? "FIFREEZE" : "FITHAW");
    if (fd >= 0)
        close(fd);
    return result;
}

int disk_hold_freeze(const char *name, char *reply)
{
    return freeze_ioctl(name, FIFREEZE, reply);
}

int disk_release_freeze(const char *name, char *reply)
{
    return freeze_ioctl(name, FITHAW, reply);
}

/* A mount that the agent lists and cannot open: a second mount of the disk, hidden below another
 * one. qemu-ga takes EBUSY and EOPNOTSUPP from FIFREEZE for success, so a held freeze cannot make
 * its freeze fail; this does. */
int disk_bad_mount(const char *name, char *reply)
{
    const char *directory = disk_directory(name, reply);
    char hidden[64];
    if (!directory)
        return -1;
    snprintf(hidden, sizeof hidden, "/mnt/bad/%s", name);
    mkdir("/mnt/bad", 0755);
    mkdir(hidden, 0755);
    if (mount(directory, hidden, NULL, MS_BIND, NULL) ||
        mount("tmpfs", "/mnt/bad", "tmpfs", 0, NULL))
        return fail(reply, "bad-mount");
    return 0;
}

int disk_good_mount(const char *name, char *reply)
{
    char hidden[64];
    snprintf(hidden, sizeof hidden, "/mnt/bad/%.32s", name);
    if (umount("/mnt/bad") || umount(hidden))
        return fail(reply, "good-mount");
    return 0;
}

static int open_file(const char *name, const char *file, int flags, char *reply)
{
    const char *directory = disk_directory(name, reply);
    char path[128];
    if (!directory)
        return -1;
    snprintf(path, sizeof path, "%s/%.64s", directory, file);
    int fd = open(path, flags | O_CLOEXEC, 0644);
    return fd < 0 ? fail(reply, path) : fd;
}

int disk_write(const char *name, const char *file, const char *text, char *reply)
{
    int fd = open_file(name, file, O_WRONLY | O_CREAT | O_TRUNC, reply);
    if (fd < 0)
        return -1;
    bool good = write(fd, text, strlen(text)) == (ssize_t)strlen(text) && !fsync(fd);
    if (!good)
        fail(reply, "write");
    close(fd);
    return good ? 0 : -1;
}

int disk_read(const char *name, const char *file, char *reply)
{
    char text[1024];
    int fd = open_file(name, file, O_RDONLY, reply);
    if (fd < 0)
        return -1;
    ssize_t length = read(fd, text, sizeof text);
    close(fd);
    if (length < 0)
        return fail(reply, "read");
    size_t used = append(reply, REPLY_SIZE, 0, "{\"text\":\"");
    for (ssize_t i = 0; i < length; i++)
        used = append(reply, REPLY_SIZE, used,
                      text[i] < ' ' || strchr("\"\\", text[i]) ? "\\u%04x" : "%c",
                      (unsigned char)text[i]);
    append(reply, REPLY_SIZE, used, "\"}");
    return 0;
}

/* Data that no zero detection and no compression makes small: for jobs that have to take a while.
 * */
int disk_fill(const char *name, const char *file, unsigned mebibytes, char *reply)
{
    static uint64_t block[128 * 1024]; /* 1 MiB; two fills at once would only mix random data */
    uint64_t state = now_ns() | 1;
    int fd = open_file(name, file, O_WRONLY | O_CREAT | O_TRUNC, reply);
    bool good = fd >= 0;
    for (; good && mebibytes; mebibytes--) {
        for (size_t i = 0; i < sizeof block / sizeof *block; i++) {
            state ^= state << 13, state ^= state >> 7, state ^= state << 17;
            block[i] = state;
        }
        good = write(fd, block, sizeof block) == sizeof block;
    }
    if (fd >= 0 && (!good || fsync(fd)))
        good = false, fail(reply, "fill");
    if (fd >= 0)
        close(fd);
    return good ? 0 : -1;
}
