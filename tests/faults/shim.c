/* Faults of a disk, placed: loaded before libc (LD_PRELOAD), this counts a process's operations on files below some folders
 * and at the n-th ends the job, tears the write, or answers as a full or broken disk does.
 *
 * Nothing happens until faults_arm() finds FAULTS_WATCH in the environment. It is called when a process starts, and by a fork
 * of a process that was started unarmed.
 *
 *   FAULTS_WATCH    folders, ':' between them; what is below them is counted
 *   FAULTS_COUNTER  a file of 8 bytes that all processes of the job count in
 *   FAULTS_AT       n, from 1; 0: never
 *   FAULTS_HOW      kill: before the n-th operation, the whole process group;
 *                   torn: half of the n-th write, or all of another operation, is done, then the group is killed;
 *                   full: the n-th write is cut short and, like every later one, ENOSPC; what takes no space works;
 *                   eio: the n-th operation fails with EIO, once;
 *                   term: the process gets SIGTERM before the n-th operation, which is done;
 *                   int: the same with SIGINT, and once more before the next one;
 *                   stop: the process stops before the n-th operation, until SIGCONT
 *   FAULTS_LOG      a file that gets a line an operation: its number, seconds (CLOCK_BOOTTIME), name and path
 *   FAULTS_CLOCK    seconds by which the wall clock jumps (CLOCK_REALTIME) at the n-th operation
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum how { COUNT, KILL, TORN, FULL, EIO_ONCE, TERM, INT_TWICE, STOP };
enum kind { PLAIN, GROWS, WRITES }; /* takes no space; takes some; is a write, which can be cut short */
enum verdict { GO_ON, HALF, HALF_THEN_DIE, DIE_AFTER, FAIL };

static char watch[4096];
static uint64_t *counter, own;
static long at;
static enum how how;
static int log_file = -1;
static double jump;
static volatile int armed;

#define REAL(name) ((__typeof__(&name))real(#name))
static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

static void die(void) {
    kill(0, SIGKILL);
    for (;;) pause();
}

__attribute__((constructor)) void faults_arm(void) {
    const char *given = getenv("FAULTS_WATCH"), *file = getenv("FAULTS_COUNTER"), *text;
    if (given == NULL) return;
    strncpy(watch, given, sizeof watch - 1);
    at = (text = getenv("FAULTS_AT")) ? atol(text) : 0;
    jump = (text = getenv("FAULTS_CLOCK")) ? atof(text) : 0;
    text = getenv("FAULTS_HOW");
    how = text == NULL ? COUNT : !strcmp(text, "kill") ? KILL : !strcmp(text, "torn") ? TORN
        : !strcmp(text, "full") ? FULL : !strcmp(text, "eio") ? EIO_ONCE
        : !strcmp(text, "term") ? TERM : !strcmp(text, "int") ? INT_TWICE : !strcmp(text, "stop") ? STOP : COUNT;
    counter = &own;
    if (file != NULL) {
        int fd = (int)syscall(SYS_openat, AT_FDCWD, file, O_RDWR | O_CLOEXEC);
        if (fd >= 0) {
            void *shared = mmap(NULL, 8, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
            if (shared != MAP_FAILED) counter = shared;
            syscall(SYS_close, fd);
        }
    }
    if ((text = getenv("FAULTS_LOG")) != NULL)
        log_file = (int)syscall(SYS_openat, AT_FDCWD, text, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    armed = 1;
}

static int watched(const char *path) {
    for (const char *start = watch; *start;) {
        const char *end = strchrnul(start, ':');
        size_t length = (size_t)(end - start);
        if (length && !strncmp(path, start, length) && (path[length] == '/' || path[length] == 0)) return 1;
        start = *end ? end + 1 : end;
    }
    return 0;
}

static int full_path(int folder, const char *path, char *out) {
    char where[PATH_MAX];
    if (path[0] == '/') return snprintf(out, PATH_MAX, "%s", path) > 0;
    if (folder == AT_FDCWD) {
        if (syscall(SYS_getcwd, where, sizeof where) < 0) return 0;
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, where, sizeof where - 1);
        if (length <= 0) return 0;
        where[length] = 0;
    }
    if (path[0] == 0) return snprintf(out, PATH_MAX, "%s", where) > 0;
    return snprintf(out, PATH_MAX, "%s/%s", where, path) > 0;
}

/* What is to be done about an operation; counts it if its file is watched. */
static enum verdict consider(const char *name, int folder, const char *path, enum kind kind) {
    char whole[PATH_MAX];
    if (!armed || path == NULL) return GO_ON;
    int before = errno;
    if (!full_path(folder, path, whole) || !watched(whole)) {
        errno = before;
        return GO_ON;
    }
    long number = (long)__atomic_add_fetch(counter, 1, __ATOMIC_SEQ_CST);
    if (log_file >= 0) {
        char line[PATH_MAX + 64];
        struct timespec now;
        syscall(SYS_clock_gettime, CLOCK_BOOTTIME, &now);
        int length = snprintf(line, sizeof line, "%ld %.6f %s %s\n", number, (double)now.tv_sec + 1e-9 * (double)now.tv_nsec, name, whole);
        syscall(SYS_write, log_file, line, (size_t)length);
    }
    errno = before;
    if (at == 0 || number < at) return GO_ON;
    switch (how) {
        case KILL: if (number == at) die(); return GO_ON;
        case TORN: return number != at ? GO_ON : kind == WRITES ? HALF_THEN_DIE : DIE_AFTER;
        case FULL:
            if (kind == PLAIN) return GO_ON;
            if (number == at && kind == WRITES) return HALF;
            errno = ENOSPC;
            return FAIL;
        case EIO_ONCE:
            if (number != at) return GO_ON;
            errno = EIO;
            return FAIL;
        case TERM: if (number == at) kill(getpid(), SIGTERM); return GO_ON;
        case STOP: if (number == at) kill(getpid(), SIGSTOP); return GO_ON;
        case INT_TWICE: if (number <= at + 1) kill(getpid(), SIGINT); return GO_ON;
        default: return GO_ON;
    }
}

static enum verdict consider_fd(const char *name, int fd, enum kind kind) {
    return armed ? consider(name, fd, "", kind) : GO_ON;
}

#define AROUND(verdict, call)                 \
    do {                                      \
        if ((verdict) == FAIL) return -1;     \
        __typeof__(call) result_ = (call);    \
        if ((verdict) == DIE_AFTER) die();    \
        return result_;                       \
    } while (0)

/* ---- opening: only to write, and it takes space only where the file is new ---- */
static enum verdict opening(int folder, const char *path, int flags) {
    if (!armed || (flags & O_ACCMODE) == O_RDONLY || path == NULL) return GO_ON;
    struct stat found;
    int is_new = (flags & O_CREAT) && syscall(SYS_newfstatat, folder, path, &found, 0) != 0;
    return consider("open", folder, path, is_new || (flags & O_TMPFILE) == O_TMPFILE ? GROWS : PLAIN);
}

#define MODE                                                        \
    mode_t mode = 0;                                                \
    if (flags & (O_CREAT | O_TMPFILE)) {                            \
        va_list more;                                               \
        va_start(more, flags);                                      \
        mode = va_arg(more, mode_t);                                \
        va_end(more);                                               \
    }

int open(const char *path, int flags, ...) { MODE enum verdict v = opening(AT_FDCWD, path, flags); AROUND(v, REAL(open)(path, flags, mode)); }
int open64(const char *path, int flags, ...) { MODE enum verdict v = opening(AT_FDCWD, path, flags); AROUND(v, REAL(open64)(path, flags, mode)); }
int openat(int folder, const char *path, int flags, ...) { MODE enum verdict v = opening(folder, path, flags); AROUND(v, REAL(openat)(folder, path, flags, mode)); }
int openat64(int folder, const char *path, int flags, ...) { MODE enum verdict v = opening(folder, path, flags); AROUND(v, REAL(openat64)(folder, path, flags, mode)); }

static FILE *opened(const char *path, const char *how_opened, const char *symbol) {
    int flags = how_opened[0] == 'r' && !strchr(how_opened, '+') ? O_RDONLY : O_RDWR | O_CREAT;
    if (opening(AT_FDCWD, path, flags) == FAIL) return NULL;
    return ((FILE * (*)(const char *, const char *)) real(symbol))(path, how_opened);
}
FILE *fopen(const char *path, const char *mode) { return opened(path, mode, "fopen"); }
FILE *fopen64(const char *path, const char *mode) { return opened(path, mode, "fopen64"); }

/* ---- writing ---- */
#define WRITING(name, fd, size, call_with)                          \
    enum verdict v = consider_fd(name, fd, WRITES);                 \
    if (v == FAIL) return -1;                                       \
    if (v == HALF || v == HALF_THEN_DIE) {                          \
        size_t part = (size) / 2;                                   \
        if (part == 0 && v == HALF) { errno = ENOSPC; return -1; }  \
        ssize_t done = part ? call_with(part) : 0;                  \
        if (v == HALF_THEN_DIE) die();                              \
        return done;                                                \
    }                                                               \
    return call_with(size)

#define W(n) REAL(write)(fd, data, n)
ssize_t write(int fd, const void *data, size_t size) { WRITING("write", fd, size, W); }
#define P(n) REAL(pwrite)(fd, data, n, where)
ssize_t pwrite(int fd, const void *data, size_t size, off_t where) { WRITING("pwrite", fd, size, P); }
#define P64(n) REAL(pwrite64)(fd, data, n, where)
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t where) { WRITING("pwrite", fd, size, P64); }
#define C(n) REAL(copy_file_range)(from, from_at, fd, at_, n, flags)
ssize_t copy_file_range(int from, off64_t *from_at, int fd, off64_t *at_, size_t size, unsigned flags) { WRITING("copy_file_range", fd, size, C); }
#define S(n) REAL(sendfile)(fd, from, where, n)
ssize_t sendfile(int fd, int from, off_t *where, size_t size) { WRITING("sendfile", fd, size, S); }
#define S64(n) REAL(sendfile64)(fd, from, where, n)
ssize_t sendfile64(int fd, int from, off64_t *where, size_t size) { WRITING("sendfile", fd, size, S64); }

ssize_t writev(int fd, const struct iovec *parts, int count) {
    enum verdict v = consider_fd("writev", fd, WRITES);
    if (v == FAIL) return -1;
    if (v == HALF || v == HALF_THEN_DIE) {
        ssize_t done = count ? REAL(write)(fd, parts[0].iov_base, parts[0].iov_len / 2) : 0;
        if (v == HALF_THEN_DIE) die();
        if (done == 0) { errno = ENOSPC; return -1; }
        return done;
    }
    return REAL(writev)(fd, parts, count);
}

/* ---- sizes, synchronising, maps ---- */
int ftruncate(int fd, off_t size) { enum verdict v = consider_fd("ftruncate", fd, size ? GROWS : PLAIN); AROUND(v, REAL(ftruncate)(fd, size)); }
int ftruncate64(int fd, off64_t size) { enum verdict v = consider_fd("ftruncate", fd, size ? GROWS : PLAIN); AROUND(v, REAL(ftruncate64)(fd, size)); }
int posix_fallocate(int fd, off_t from, off_t size) { enum verdict v = consider_fd("fallocate", fd, GROWS); if (v == FAIL) return errno; AROUND(v, REAL(posix_fallocate)(fd, from, size)); }
int fallocate(int fd, int mode, off_t from, off_t size) { enum verdict v = consider_fd("fallocate", fd, GROWS); AROUND(v, REAL(fallocate)(fd, mode, from, size)); }
int fsync(int fd) { enum verdict v = consider_fd("fsync", fd, PLAIN); AROUND(v, REAL(fsync)(fd)); }
int fdatasync(int fd) { enum verdict v = consider_fd("fsync", fd, PLAIN); AROUND(v, REAL(fdatasync)(fd)); }

static enum verdict mapping(int protection, int flags, int fd) {
    return armed && fd >= 0 && (flags & MAP_SHARED) && (protection & PROT_WRITE) ? consider_fd("mmap", fd, GROWS) : GO_ON;
}
void *mmap(void *wanted, size_t size, int protection, int flags, int fd, off_t from) {
    enum verdict v = mapping(protection, flags, fd);
    if (v == FAIL) return MAP_FAILED;
    void *found = (void *)syscall(SYS_mmap, wanted, size, protection, flags, fd, from);
    if (v == DIE_AFTER) die();
    return found;
}
void *mmap64(void *wanted, size_t size, int protection, int flags, int fd, off64_t from) { return mmap(wanted, size, protection, flags, fd, from); }

/* ---- names ---- */
int rename(const char *from, const char *to) { enum verdict v = consider("rename", AT_FDCWD, to, PLAIN); AROUND(v, REAL(rename)(from, to)); }
int renameat(int a, const char *from, int b, const char *to) { enum verdict v = consider("rename", b, to, PLAIN); AROUND(v, REAL(renameat)(a, from, b, to)); }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) { enum verdict v = consider("rename", b, to, PLAIN); AROUND(v, REAL(renameat2)(a, from, b, to, flags)); }
int link(const char *from, const char *to) { enum verdict v = consider("link", AT_FDCWD, to, GROWS); AROUND(v, REAL(link)(from, to)); }
int linkat(int a, const char *from, int b, const char *to, int flags) { enum verdict v = consider("link", b, to, GROWS); AROUND(v, REAL(linkat)(a, from, b, to, flags)); }
int symlink(const char *from, const char *to) { enum verdict v = consider("symlink", AT_FDCWD, to, GROWS); AROUND(v, REAL(symlink)(from, to)); }
int mkdir(const char *path, mode_t mode) { enum verdict v = consider("mkdir", AT_FDCWD, path, GROWS); AROUND(v, REAL(mkdir)(path, mode)); }
int mkdirat(int folder, const char *path, mode_t mode) { enum verdict v = consider("mkdir", folder, path, GROWS); AROUND(v, REAL(mkdirat)(folder, path, mode)); }
int unlink(const char *path) { enum verdict v = consider("unlink", AT_FDCWD, path, PLAIN); AROUND(v, REAL(unlink)(path)); }
int unlinkat(int folder, const char *path, int flags) { enum verdict v = consider("unlink", folder, path, PLAIN); AROUND(v, REAL(unlinkat)(folder, path, flags)); }
int rmdir(const char *path) { enum verdict v = consider("rmdir", AT_FDCWD, path, PLAIN); AROUND(v, REAL(rmdir)(path)); }
int chmod(const char *path, mode_t mode) { enum verdict v = consider("chmod", AT_FDCWD, path, PLAIN); AROUND(v, REAL(chmod)(path, mode)); }
int fchmod(int fd, mode_t mode) { enum verdict v = consider_fd("chmod", fd, PLAIN); AROUND(v, REAL(fchmod)(fd, mode)); }

/* ---- the wall clock, which jumps at the n-th operation; clocks that only go forward are left alone ---- */
static double moved(void) { return armed && jump != 0 && (long)*counter >= at ? jump : 0; }

int clock_gettime(clockid_t clock, struct timespec *found) {
    int code = (int)syscall(SYS_clock_gettime, clock, found);
    if (code == 0 && clock == CLOCK_REALTIME) found->tv_sec += (time_t)moved();
    return code;
}
int gettimeofday(struct timeval *restrict found, void *restrict zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    found->tv_sec = now.tv_sec;
    found->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *found) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (found != NULL) *found = now.tv_sec;
    return now.tv_sec;
}
