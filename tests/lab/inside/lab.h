/* What the parts of guestd share. guestd is PID 1 of the lab's guest: it keeps the disks busy, runs
 * the guest agents, and tells the host what the guest felt, over a serial port that no frozen file
 * system can block. */
#ifndef LAB_H
#define LAB_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MAX_DISKS 8
#define MAX_AGENTS 4
#define REPLY_SIZE 4096

/* disks.c */
void disks_mount_all(void);
void disks_set_writing(bool on);
void disks_set_pause(unsigned microseconds);
void disks_reset(void);
void disks_stalls(char *json, size_t size);
void disks_leave(void);
const char *disk_directory(const char *disk, char *reply); /* where it is mounted */

/* disks.c and orders.c. Each of these may block on a frozen file system, and so runs in a thread of
 * its own. They fill `reply` with JSON and return 0, or return -1 with the reason in it. */
int disk_mount(const char *disk, char *reply);
int disk_umount(const char *disk, char *reply);

/* orders.c */
int disk_hold_freeze(const char *disk, char *reply);
int disk_release_freeze(const char *disk, char *reply);
int disk_bad_mount(const char *disk, char *reply);
int disk_good_mount(const char *disk, char *reply);
int disk_write(const char *disk, const char *file, const char *text, char *reply);
int disk_read(const char *disk, const char *file, char *reply);
int disk_fill(const char *disk, const char *file, unsigned mebibytes, char *reply);

/* agents.c */
void agents_start(void);
int agents_signal(const char *port, int signal, char *reply);
void agents_reaped(int pid);
void agents_list(char *json, size_t size);

/* guestd.c */
void pulse(char disk);
uint64_t now_ns(void);
size_t append(char *text, size_t size, size_t used, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
int fail(char *reply, const char *what);

#endif
