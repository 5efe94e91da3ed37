/*
 * Faults on demand for the files below $FAULT_PATH, preloaded into the program under test.
 *
 * $FAULT_TRIGGERS is a folder; a file in it switches a fault on, and removing it switches the fault off:
 *
 *   sync_fails     fsync and fdatasync fail with EIO (the number in the file: after that many more calls)
 *   sync_full      they fail with ENOSPC
 *   sync_lies      they return success and do nothing
 *   sync_slow      they take that many milliseconds
 *   sync_hangs     they return when the fault is switched off
 *   sync_dir_fails fsync of a directory fails with EIO
 *   write_hangs    writes return when the fault is switched off
 *   write_full     writes fail with ENOSPC, and so does making or growing a file
 *   read_only      whatever would change a file fails with EROFS, as after the kernel has remounted the file system
 *   send_faults    sending that many bytes or more at once to a socket fails with EFAULT: how the kernel tells that a page of
 *                  a mapped file had to be read again and could not be
 *   read_fails     pread fails with EIO, and so does bringing mapped pages into memory, as the kernel tells it (EFAULT)
 *   read_hangs     pread of that many bytes or more returns when the fault is switched off
 *   open_denied    opening a file to read it fails with EACCES
 *   resolver_hangs names are looked up when the fault is switched off
 *   clock_ahead    the wall clock is that many seconds ahead; other clocks go right
 *   clock_behind   the same, behind
 *
 * $FAULT_KILL="CALL:N:before" or "CALL:N:after" ends the process by SIGKILL at the N-th such call on those files:
 * sync, write, create, rename, unlink.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netdb.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

static int below(const char *path) {
  const char *prefix = getenv("FAULT_PATH");
  return prefix && path && strncmp(path, prefix, strlen(prefix)) == 0;
}

static int ours(int fd) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return below(path);
}

/* The number in a trigger file, 0 when it is empty, -1 when it is absent. */
static long trigger(const char *name) {
  const char *folder = getenv("FAULT_TRIGGERS");
  char path[PATH_MAX], text[32] = "";
  if (!folder) return -1;
  snprintf(path, sizeof path, "%s/%s", folder, name);
  int fd = NEXT(open)(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return -1;
  if (NEXT(read)(fd, text, sizeof text - 1) < 0) text[0] = 0;
  close(fd);
  return atol(text);
}

static void step(const char *call, const char *side) {
  static atomic_long before_calls, after_calls;
  const char *plan = getenv("FAULT_KILL");
  size_t length = strlen(call);
  if (!plan || strncmp(plan, call, length) != 0 || plan[length] != ':') return;
  char *rest;
  long wanted = strtol(plan + length + 1, &rest, 10);
  if (strcmp(rest + 1, side) != 0) return;
  atomic_long *calls = strcmp(side, "before") == 0 ? &before_calls : &after_calls;
  if (atomic_fetch_add(calls, 1) + 1 == wanted) {
    kill(getpid(), SIGKILL);
    pause();
  }
}

static int spoiled_sync(int fd, int (*real)(int)) {
  static atomic_long seen;
  if (!ours(fd)) return real(fd);
  step("sync", "before");
  long after = trigger("sync_fails");
  if (after < 0) atomic_store(&seen, 0);
  else if (atomic_fetch_add(&seen, 1) >= after) { errno = EIO; return -1; }
  if (trigger("sync_full") >= 0) { errno = ENOSPC; return -1; }
  struct stat status;
  if (trigger("sync_dir_fails") >= 0 && fstat(fd, &status) == 0 && S_ISDIR(status.st_mode)) { errno = EIO; return -1; }
  long slow = trigger("sync_slow");
  if (slow > 0) nanosleep(&(struct timespec){slow / 1000, slow % 1000 * 1000000}, NULL);
  while (trigger("sync_hangs") >= 0) nanosleep(&(struct timespec){0, 5000000}, NULL);
  int result = trigger("sync_lies") >= 0 ? 0 : real(fd);
  step("sync", "after");
  return result;
}

int fsync(int fd) { return spoiled_sync(fd, NEXT(fsync)); }
int fdatasync(int fd) { return spoiled_sync(fd, NEXT(fdatasync)); }
int syncfs(int fd) { return spoiled_sync(fd, NEXT(syncfs)); }

static int read_only(void) {
  if (trigger("read_only") < 0) return 0;
  errno = EROFS;
  return 1;
}

static int full(void) {
  if (read_only()) return 1;
  if (trigger("write_full") < 0) return 0;
  errno = ENOSPC;
  return 1;
}

static void hang_in_write(void) {
  while (trigger("write_hangs") >= 0) nanosleep(&(struct timespec){0, 5000000}, NULL);
}

#define SPOILED_WRITE(type, name, parameters, arguments) \
  type name parameters {                                 \
    if (!ours(fd)) return NEXT(name) arguments;          \
    if (full()) return -1;                               \
    hang_in_write();                                     \
    step("write", "before");                             \
    type result = NEXT(name) arguments;                  \
    step("write", "after");                              \
    return result;                                       \
  }

SPOILED_WRITE(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
SPOILED_WRITE(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
SPOILED_WRITE(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
SPOILED_WRITE(ssize_t, pwritev, (int fd, const struct iovec *parts, int count, off_t at), (fd, parts, count, at))
SPOILED_WRITE(ssize_t, pwritev64, (int fd, const struct iovec *parts, int count, off64_t at), (fd, parts, count, at))
SPOILED_WRITE(ssize_t, pwritev2, (int fd, const struct iovec *parts, int count, off_t at, int flags), (fd, parts, count, at, flags))
SPOILED_WRITE(ssize_t, pwritev64v2, (int fd, const struct iovec *parts, int count, off64_t at, int flags), (fd, parts, count, at, flags))

ssize_t writev(int fd, const struct iovec *parts, int count) {
  if (!ours(fd)) {
    size_t size = 0;
    for (int i = 0; i < count; i++) size += parts[i].iov_len;
    long limit = trigger("send_faults");
    if (limit > 0 && size >= (size_t)limit) { errno = EFAULT; return -1; }
    return NEXT(writev)(fd, parts, count);
  }
  if (full()) return -1;
  hang_in_write();
  step("write", "before");
  ssize_t result = NEXT(writev)(fd, parts, count);
  step("write", "after");
  return result;
}

static int spoiled_grow(int fd) { return ours(fd) && full(); }

int fallocate(int fd, int mode, off_t at, off_t size) { return spoiled_grow(fd) ? -1 : NEXT(fallocate)(fd, mode, at, size); }
int fallocate64(int fd, int mode, off64_t at, off64_t size) { return spoiled_grow(fd) ? -1 : NEXT(fallocate64)(fd, mode, at, size); }
int posix_fallocate(int fd, off_t at, off_t size) { return spoiled_grow(fd) ? ENOSPC : NEXT(posix_fallocate)(fd, at, size); }
int posix_fallocate64(int fd, off64_t at, off64_t size) { return spoiled_grow(fd) ? ENOSPC : NEXT(posix_fallocate64)(fd, at, size); }

static void hang_in_read(size_t size) {
  for (long limit; (limit = trigger("read_hangs")) >= 0 && size >= (size_t)limit;) nanosleep(&(struct timespec){0, 5000000}, NULL);
}

#define SPOILED_READ(name, type)                                                            \
  ssize_t name(int fd, void *data, size_t size, type at) {                                  \
    if (ours(fd) && trigger("read_fails") >= 0) { errno = EIO; return -1; }                 \
    if (ours(fd)) hang_in_read(size);                                                       \
    return NEXT(name)(fd, data, size, at);                                                  \
  }

SPOILED_READ(pread, off_t)
SPOILED_READ(pread64, off64_t)

/* Only the store asks for this advice. */
int madvise(void *start, size_t size, int advice) {
  if (advice == MADV_POPULATE_READ && trigger("read_fails") >= 0) { errno = EFAULT; return -1; }
  return NEXT(madvise)(start, size, advice);
}

static int denied(int flags) {
  return (flags & (O_ACCMODE | O_CREAT | O_DIRECTORY)) == O_RDONLY && trigger("open_denied") >= 0;
}

#define SPOILED_OPEN(name)                                                                  \
  int name(const char *path, int flags, ...) {                                              \
    va_list rest;                                                                           \
    va_start(rest, flags);                                                                  \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                 \
    va_end(rest);                                                                           \
    if ((flags & O_ACCMODE) != O_RDONLY && below(path) && read_only()) return -1;           \
    if (below(path) && denied(flags)) { errno = EACCES; return -1; }                        \
    if (!(flags & O_CREAT) || !below(path)) return NEXT(name)(path, flags, mode);           \
    if (full()) return -1;                                                                  \
    step("create", "before");                                                               \
    int fd = NEXT(name)(path, flags, mode);                                                 \
    step("create", "after");                                                                \
    return fd;                                                                              \
  }

SPOILED_OPEN(open)
SPOILED_OPEN(open64)

int rename(const char *from, const char *to) {
  if (!below(from)) return NEXT(rename)(from, to);
  if (read_only()) return -1;
  step("rename", "before");
  int result = NEXT(rename)(from, to);
  step("rename", "after");
  return result;
}

int unlink(const char *path) {
  if (!below(path)) return NEXT(unlink)(path);
  if (read_only()) return -1;
  step("unlink", "before");
  int result = NEXT(unlink)(path);
  step("unlink", "after");
  return result;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  int result = NEXT(clock_gettime)(clock, now);
  if (result == 0 && clock == CLOCK_REALTIME) {
    long ahead = trigger("clock_ahead"), behind = trigger("clock_behind");
    now->tv_sec += ahead > 0 ? ahead : 0;
    now->tv_sec -= behind > 0 ? behind : 0;
  }
  return result;
}

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
  while (trigger("resolver_hangs") >= 0) nanosleep(&(struct timespec){0, 5000000}, NULL);
  return NEXT(getaddrinfo)(node, service, hints, found);
}
