/* A disk that fails as it is told to: preloaded into a process, it stands before the calls of the C library.

   The variable FAULTY_DISK holds rules, one a line: CALL|PART OF A PATH|ERROR NUMBER|FIRST|LAST|MILLISECONDS. Of the
   calls of that kind whose path has that part, the FIRST to the LAST (from 1 on; counted in each process) fail with
   that error, after so many milliseconds; error 0 lets them through. Calls are open (for reading), create (for
   writing), read, write, sync, rename, link and stat. The variable is read at each call, so a forked process can be
   told something else; as long as it is not set, nothing happens.

   With the variable FAULTY_CLOCK the time of day jumps by days, to and fro, each time that it is asked for. Clocks that
   only go forward are left alone. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define MOST_RULES 16

static int counts[MOST_RULES];

static void wait_for(long milliseconds) {
    struct timespec pause = {milliseconds / 1000, (milliseconds % 1000) * 1000000L};
    nanosleep(&pause, NULL);
}

/* The error that a call ends with; 0 for none. */
static int fault(const char *call, const char *path) {
    const char *rule = getenv("FAULTY_DISK");
    if (rule == NULL || path == NULL)
        return 0;
    for (int number = 0; *rule && number < MOST_RULES; number++) {
        char name[16], part[1024];
        int error, first, last;
        long pause;
        int length = 0;
        if (sscanf(rule, "%15[^|]|%1023[^|]|%d|%d|%d|%ld%n", name, part, &error, &first, &last, &pause, &length) == 6
            && strcmp(name, call) == 0 && strstr(path, part) != NULL) {
            int count = __sync_add_and_fetch(&counts[number], 1);
            if (first <= count && count <= last) {
                wait_for(pause);
                if (error)
                    return error;
            }
        }
        rule = strchr(rule, '\n');
        if (rule == NULL)
            return 0;
        rule++;
    }
    return 0;
}

static int fault_of(const char *call, int descriptor) {
    char link[64], path[4096];
    if (getenv("FAULTY_DISK") == NULL)
        return 0;
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (length < 0)
        return 0;
    path[length] = 0;
    return fault(call, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL_WITH(error, value) do { int found = (error); if (found) { errno = found; return value; } } while (0)

static const char *kind(int flags) { return (flags & O_ACCMODE) == O_RDONLY ? "open" : "create"; }

static int mode_of(int flags, va_list *more) {
    return flags & (O_CREAT | O_TMPFILE) ? va_arg(*more, int) : 0;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list more; va_start(more, flags); int mode = mode_of(flags, &more); va_end(more); \
        FAIL_WITH(fault(kind(flags), path), -1); \
        return REAL(name)(path, flags, mode); }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        va_list more; va_start(more, flags); int mode = mode_of(flags, &more); va_end(more); \
        FAIL_WITH(fault(kind(flags), path), -1); \
        return REAL(name)(folder, path, flags, mode); }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        FAIL_WITH(fault(strpbrk(mode, "wa+") ? "create" : "open", path), NULL); \
        return REAL(name)(path, mode); }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t read(int file, void *place, size_t size) {
    FAIL_WITH(fault_of("read", file), -1);
    return REAL(read)(file, place, size);
}
ssize_t pread(int file, void *place, size_t size, off_t from) {
    FAIL_WITH(fault_of("read", file), -1);
    return REAL(pread)(file, place, size, from);
}
ssize_t pread64(int file, void *place, size_t size, off64_t from) {
    FAIL_WITH(fault_of("read", file), -1);
    return REAL(pread64)(file, place, size, from);
}
size_t fread(void *place, size_t size, size_t times, FILE *file) {
    FAIL_WITH(fault_of("read", fileno(file)), 0);
    return REAL(fread)(place, size, times, file);
}
ssize_t write(int file, const void *content, size_t size) {
    FAIL_WITH(fault_of("write", file), -1);
    return REAL(write)(file, content, size);
}
ssize_t pwrite64(int file, const void *content, size_t size, off64_t to) {
    FAIL_WITH(fault_of("write", file), -1);
    return REAL(pwrite64)(file, content, size, to);
}
ssize_t writev(int file, const struct iovec *parts, int number) {
    FAIL_WITH(fault_of("write", file), -1);
    return REAL(writev)(file, parts, number);
}
size_t fwrite(const void *content, size_t size, size_t times, FILE *file) {
    FAIL_WITH(fault_of("write", fileno(file)), 0);
    return REAL(fwrite)(content, size, times, file);
}
int fsync(int file) {
    FAIL_WITH(fault_of("sync", file), -1);
    return REAL(fsync)(file);
}
int rename(const char *from, const char *to) {
    FAIL_WITH(fault("rename", to), -1);
    return REAL(rename)(from, to);
}
int renameat(int before, const char *from, int after, const char *to) {
    FAIL_WITH(fault("rename", to), -1);
    return REAL(renameat)(before, from, after, to);
}
int link(const char *from, const char *to) {
    FAIL_WITH(fault("link", to), -1);
    return REAL(link)(from, to);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static __thread int asked;
    static __thread __typeof__(&clock_gettime) real;
    if (real == NULL)
        real = REAL(clock_gettime);
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME && result == 0 && getenv("FAULTY_CLOCK") != NULL)
        now->tv_sec += (asked++ % 2 ? 3 : -2) * 86400L;
    return result;
}

#define STAT(name, type) \
    int name(const char *path, struct type *place) { \
        FAIL_WITH(fault("stat", path), -1); \
        return REAL(name)(path, place); }
STAT(stat, stat)
STAT(stat64, stat64)
int fstatat(int folder, const char *path, struct stat *place, int flags) {
    FAIL_WITH(fault("stat", path), -1);
    return REAL(fstatat)(folder, path, place, flags);
}
int fstatat64(int folder, const char *path, struct stat64 *place, int flags) {
    FAIL_WITH(fault("stat", path), -1);
    return REAL(fstatat64)(folder, path, place, flags);
}
