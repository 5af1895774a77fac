/* A disk that fails at its Nth call: preloaded into a test's process, armed there through ctypes.

   From `disk_arm` to `disk_heal` it counts the calls below that change files under one folder, and
   makes one of them fail. Nothing is really synchronised: what a killed process wrote stays in the
   page cache, and what a power cut would lose is taken back by hand. For that, each change is noted
   with what was there before until it is durable: bytes by an fsync of their file, names by an
   fsync of their folder (POSIX promises no more).

   Not seen: writes through mmap (SQLite's -shm, which is rebuilt), sendfile, and libc's own FILE. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The order is that of `Fault` in disk.py. */
enum fault { NONE, IO_ERROR, FULL, SHORT_WRITE, KILL, POWER_CUT, LOST_DATA };
enum change { WRITTEN, CREATED, MADE_FOLDER, RENAMED, UNLINKED };

struct note {
  struct note *before;
  enum change change;
  dev_t device; /* of the file, or of the folder with the name: what an fsync makes durable */
  ino_t inode;
  int file;
  off_t offset, size; /* the file's size before */
  size_t held;        /* bytes in `old` */
  char *old;
  char path[PATH_MAX], target[PATH_MAX], kept[PATH_MAX];
};

static char root[PATH_MAX];
static enum fault fault = NONE;
static long calls, at;
static struct note *notes;

static int is_inside(const char *path) {
  size_t length = strlen(root);
  return fault != NONE && strncmp(path, root, length) == 0 && (path[length] == '/' || !path[length]);
}

static int is_file_inside(int file) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = fault == NONE ? -1 : readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return is_inside(path);
}

static int really_rename(const char *from, const char *to) {
  return (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}

static void undo(const struct note *note) {
  switch (note->change) {
    case WRITTEN:
      if (note->held) syscall(SYS_pwrite64, note->file, note->old, note->held, note->offset);
      syscall(SYS_ftruncate, note->file, note->size);
      break;
    case CREATED:
      syscall(SYS_unlinkat, AT_FDCWD, note->path, 0);
      break;
    case MADE_FOLDER:
      syscall(SYS_unlinkat, AT_FDCWD, note->path, AT_REMOVEDIR);
      break;
    case RENAMED:
      really_rename(note->target, note->path);
      if (*note->kept) really_rename(note->kept, note->target);
      break;
    case UNLINKED:
      really_rename(note->kept, note->path);
  }
}

static void die(void) {
  for (struct note *note = notes; note; note = note->before)
    if (fault == POWER_CUT || note->change == WRITTEN) undo(note);
  kill(getpid(), SIGKILL);
}

/* Count a call and tell whether it fails, with errno set. */
static int fails(int needs_room) {
  calls++;
  if (calls < at) return 0;
  switch (fault) {
    case IO_ERROR:
      errno = EIO;
      return calls == at;
    case FULL:
    case SHORT_WRITE:
      errno = ENOSPC;
      return needs_room;
    default:
      if (calls == at) die();
      return 0;
  }
}

static struct note *new_note(enum change change) {
  struct note *note = calloc(1, sizeof *note);
  if (!note) abort();
  note->change = change;
  note->before = notes;
  return notes = note;
}

static struct note *note_name(enum change change, const char *path) {
  struct note *note = new_note(change);
  struct stat folder;
  char parent[PATH_MAX];
  snprintf(note->path, sizeof note->path, "%s", path);
  snprintf(parent, sizeof parent, "%s", path);
  *strrchr(parent, '/') = 0;
  if (stat(parent, &folder)) abort();
  note->device = folder.st_dev, note->inode = folder.st_ino;
  return note;
}

/* Keep what a name stands for, beside the armed folder. */
static void keep(struct note *note, const char *path) {
  static int number;
  snprintf(note->kept, sizeof note->kept, "%.4000s.kept-%d-%d", root, getpid(), number++);
  if (syscall(SYS_linkat, AT_FDCWD, path, AT_FDCWD, note->kept, 0)) *note->kept = 0;
}

static void note_bytes(int file, off_t offset, size_t length) {
  char link[64];
  struct stat state;
  struct note *note = new_note(WRITTEN);
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  note->file = (int)syscall(SYS_openat, AT_FDCWD, link, O_RDWR | O_CLOEXEC);
  if (note->file < 0 || fstat(note->file, &state) || !(note->old = malloc(length + 1))) abort();
  ssize_t held = pread(note->file, note->old, length, offset);
  if (held < 0) abort();
  note->device = state.st_dev, note->inode = state.st_ino;
  note->offset = offset, note->size = state.st_size, note->held = (size_t)held;
}

static int synced(int file, int (*really)(int)) {
  struct stat state;
  if (!is_file_inside(file)) return really(file);
  if (fails(0)) return -1;
  if (fstat(file, &state)) return -1;
  for (struct note **place = &notes; *place;) {
    struct note *note = *place;
    int is_bytes = note->change == WRITTEN;
    if (note->device != state.st_dev || note->inode != state.st_ino ||
        is_bytes == S_ISDIR(state.st_mode)) {
      place = &note->before;
      continue;
    }
    if (*note->kept) syscall(SYS_unlinkat, AT_FDCWD, note->kept, 0);
    if (is_bytes) close(note->file);
    free(note->old);
    *place = note->before;
    free(note);
  }
  return 0;
}

static int really_fsync(int file) { return (int)syscall(SYS_fsync, file); }
static int really_fdatasync(int file) { return (int)syscall(SYS_fdatasync, file); }
int fsync(int file) { return synced(file, really_fsync); }
int fdatasync(int file) { return synced(file, really_fdatasync); }

static ssize_t really_write(int file, const void *data, size_t length, off_t offset) {
  return offset < 0 ? syscall(SYS_write, file, data, length)
                    : syscall(SYS_pwrite64, file, data, length, offset);
}

/* Write at an offset, or at the file's position where it is negative. */
static ssize_t written(int file, const void *data, size_t length, off_t offset) {
  if (!is_file_inside(file)) return really_write(file, data, length, offset);
  if (calls + 1 == at && fault == KILL) really_write(file, data, length / 2, offset);
  if (calls + 1 == at && fault == SHORT_WRITE && length > 1) {
    calls++;
    return really_write(file, data, length / 2, offset);
  }
  if (fails(1)) return -1;
  if (fault >= POWER_CUT) note_bytes(file, offset < 0 ? lseek(file, 0, SEEK_CUR) : offset, length);
  return really_write(file, data, length, offset);
}

ssize_t write(int file, const void *data, size_t length) { return written(file, data, length, -1); }
ssize_t pwrite(int file, const void *data, size_t length, off_t offset) {
  return written(file, data, length, offset);
}
ssize_t pwrite64(int file, const void *data, size_t length, off64_t offset) {
  return written(file, data, length, offset);
}

int ftruncate(int file, off_t size) {
  struct stat state;
  if (is_file_inside(file)) {
    if (fstat(file, &state) || fails(size > state.st_size)) return -1;
    if (fault >= POWER_CUT)
      note_bytes(file, size, state.st_size > size ? (size_t)(state.st_size - size) : 0);
  }
  return (int)syscall(SYS_ftruncate, file, size);
}
int ftruncate64(int file, off64_t size) { return ftruncate(file, size); }

int rename(const char *from, const char *to) {
  if (is_inside(from)) {
    if (fails(1)) return -1;
    if (fault >= POWER_CUT) {
      struct note *note = note_name(RENAMED, from);
      snprintf(note->target, sizeof note->target, "%s", to);
      keep(note, to);
    }
  }
  return really_rename(from, to);
}

int unlink(const char *path) {
  if (is_inside(path) && faccessat(AT_FDCWD, path, F_OK, AT_SYMLINK_NOFOLLOW) == 0) {
    if (fails(0)) return -1;
    if (fault >= POWER_CUT) keep(note_name(UNLINKED, path), path);
  }
  return (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0);
}

int mkdir(const char *path, mode_t mode) {
  if (is_inside(path) && faccessat(AT_FDCWD, path, F_OK, AT_SYMLINK_NOFOLLOW)) {
    if (fails(1)) return -1;
    if (fault >= POWER_CUT) note_name(MADE_FOLDER, path);
  }
  return (int)syscall(SYS_mkdirat, AT_FDCWD, path, mode);
}

static int opened(const char *path, int flags, mode_t mode) {
  if (flags & O_CREAT && is_inside(path) &&
      faccessat(AT_FDCWD, path, F_OK, AT_SYMLINK_NOFOLLOW)) {
    if (fails(1)) return -1;
    if (fault >= POWER_CUT) note_name(CREATED, path);
  }
  return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

int open(const char *path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  return opened(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  return opened(path, flags, mode);
}

/* Fail at call `nth` of those that change files under `folder`, an absolute path without links. */
void disk_arm(const char *folder, int kind, long nth) {
  snprintf(root, sizeof root, "%s", folder);
  fault = (enum fault)kind, at = nth, calls = 0;
}

/* Stop failing and counting; return how many calls there were. */
long disk_heal(void) {
  fault = NONE;
  return calls;
}
