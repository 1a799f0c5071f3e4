/* Preloaded into a process: ends it with SIGKILL at its n-th operation on files below a folder.
 *
 * kill_at_arm(folder, n) begins to count; n = 0 only counts. A write that is to be the last one puts half of its bytes on
 * the file first; every other operation is not done at all. kill_at_count() tells how many there were.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static char below[PATH_MAX];
static atomic_long last, count;
static atomic_int armed;

void kill_at_arm(const char *folder, long n) {
  snprintf(below, sizeof below, "%s", folder);
  last = n;
  count = 0;
  armed = 1;
}

long kill_at_count(void) { return count; }

static int counts(const char *path) { return armed && strncmp(path, below, strlen(below)) == 0; }

/* Whether this operation is the last one; the path may be relative to a folder's descriptor. */
static int is_last(int at, const char *name) {
  char path[2 * PATH_MAX], link[64];
  if (!armed) return 0;
  if (name && name[0] == '/') {
    snprintf(path, sizeof path, "%s", name);
  } else {
    snprintf(link, sizeof link, "/proc/self/fd/%d", at);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (name) snprintf(path + length, sizeof path - length, "/%s", name);
  }
  if (!counts(path)) return 0;
  return atomic_fetch_add(&count, 1) + 1 == last;
}

static void end(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t size) {
  if (is_last(fd, NULL)) {
    REAL(write)(fd, data, size / 2);
    end();
  }
  return REAL(write)(fd, data, size);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
  if (is_last(fd, NULL)) {
    REAL(pwrite64)(fd, data, size / 2, at);
    end();
  }
  return REAL(pwrite64)(fd, data, size, at);
}

struct iovec;
ssize_t writev(int fd, const struct iovec *parts, int n) {
  if (is_last(fd, NULL)) end();
  return ((ssize_t(*)(int, const struct iovec *, int))dlsym(RTLD_NEXT, "writev"))(fd, parts, n);
}

#define ON_FD(type, name, parameters, arguments) \
  type name parameters {                         \
    if (is_last(fd, NULL)) end();                \
    return REAL(name) arguments;                 \
  }

ON_FD(int, fsync, (int fd), (fd))
ON_FD(int, fdatasync, (int fd), (fd))
ON_FD(int, ftruncate64, (int fd, off64_t size), (fd, size))
ON_FD(int, posix_fallocate64, (int fd, off64_t at, off64_t size), (fd, at, size))

#define ON_PATH(name, parameters, at, path, arguments) \
  int name parameters {                                \
    if (is_last(at, path)) end();                      \
    return REAL(name) arguments;                       \
  }

ON_PATH(rename, (const char *from, const char *to), AT_FDCWD, from, (from, to))
ON_PATH(unlink, (const char *path), AT_FDCWD, path, (path))
ON_PATH(unlinkat, (int at, const char *path, int flags), at, path, (at, path, flags))
ON_PATH(rmdir, (const char *path), AT_FDCWD, path, (path))
ON_PATH(mkdir, (const char *path, mode_t mode), AT_FDCWD, path, (path, mode))

#define OPEN(name)                                           \
  int name(const char *path, int flags, ...) {               \
    va_list rest;                                            \
    va_start(rest, flags);                                   \
    mode_t mode = va_arg(rest, mode_t);                      \
    va_end(rest);                                            \
    if ((flags & O_CREAT) && is_last(AT_FDCWD, path)) end(); \
    return REAL(name)(path, flags, mode);                    \
  }

OPEN(open)
OPEN(open64)
