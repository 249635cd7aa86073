/* A checkpoint's image: what a program is without its remote memory. One file, made by freeze.c and read by thaw.c:
 *
 *   struct image, its threads, signal actions, mappings, files; then its own memory, as runs of pages, until a run of 0
 *
 * Only blades of one rack read it, which have the same image and programs: fields are as the compiler lays them out.
 */
#ifndef RACKLESS_IMAGE_H
#define RACKLESS_IMAGE_H

#include <limits.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/time.h>
#include <sys/user.h>

#define IMAGE_MAGIC 0x31474d4959445052ull

enum { IMAGE_XSTATE = 16 << 10, IMAGE_WORD = 128, IMAGE_COMMAND = 256, IMAGE_SIGNALS = 64, IMAGE_AUXV = 512,
       IMAGE_TIMERS = 3, IMAGE_PAGE = 4096 };

struct image {
    uint64_t magic;
    uint32_t threads, maps, files;      /* how many follow */
    int32_t pid;
    char name[IMAGE_WORD], job[IMAGE_WORD], vnode[IMAGE_WORD], command[IMAGE_COMMAND];
    uint64_t excache;                   /* bytes */
    uint64_t remote_pages;              /* that are at memory blades */
    uint32_t paging;                    /* it has a pager: thread number `pager` */
    uint32_t pager;
    char directory[PATH_MAX], program[PATH_MAX];
    uint32_t umask;
    uint64_t pending;                   /* signals */
    struct itimerval timer[IMAGE_TIMERS];
    /* As prctl(PR_SET_MM_MAP) has them. */
    uint64_t start_code, end_code, start_data, end_data, start_brk, brk, start_stack, arg_start, arg_end, env_start,
        env_end;
    uint32_t auxv_bytes;
    uint8_t auxv[IMAGE_AUXV];
    uint64_t vdso;                      /* fingerprint */
    struct image_action {               /* as the kernel has it */
        uint64_t handler, flags, restorer, mask;
    } action[IMAGE_SIGNALS];
};

struct image_thread {
    int32_t tid;
    char name[16];
    struct user_regs_struct registers;
    uint64_t mask;                      /* signals */
    uint64_t tid_address;               /* where the C library keeps its thread number, and where the kernel clears it */
    uint64_t robust, robust_bytes;
    uint64_t rseq;
    uint32_t rseq_bytes, rseq_signature;
    stack_t altstack;
    uint32_t xstate_bytes;
    uint8_t xstate[IMAGE_XSTATE];
};

struct image_map {
    uint64_t start, end, offset;
    uint32_t protection;
    uint32_t flags;                     /* for mmap */
    uint32_t advice;                    /* bits: IMAGE_NOHUGEPAGE, ... */
    uint32_t kind;                      /* enum image_kind */
    uint64_t print;                     /* of a file that is not in /vnode: fingerprint */
    char path[PATH_MAX];
};

enum image_kind { MAP_OF_NOTHING, MAP_OF_FILE, MAP_OF_VDSO };
enum { IMAGE_NOHUGEPAGE = 1, IMAGE_DONTFORK = 2, IMAGE_WIPEONFORK = 4, IMAGE_DROPPABLE = 8 /* the kernel's MAP_DROPPABLE */ };

struct image_file {
    int32_t number;
    uint32_t kind;                      /* enum image_file_kind */
    int32_t same;                       /* FILE_STDIO: 0, 1, 2 of `split`; FILE_SAME: the descriptor that it is a copy of */
    int32_t flags;                      /* for open */
    uint32_t cloexec;
    int64_t offset;
    uint64_t print;                     /* 0: it is in /vnode, and what it is */
    char path[PATH_MAX];
};

enum image_file_kind { FILE_PATH, FILE_STDIO, FILE_SAME };

struct image_run {
    uint64_t address, pages;
};

/* A number for the contents of a file; 0 if it cannot be read. */
uint64_t image_fingerprint(const char *path);
uint64_t image_print(const void *data, size_t bytes, uint64_t so_far);

/* The folder of checkpoints, which every processor blade sees, and the path of one. */
#define IMAGE_FOLDER VNODE "/.checkpoints"
void image_path(char path[PATH_MAX], const char *name);

/* An image in memory but for the program's pages. */
struct loaded {
    struct image image;
    struct image_thread *thread;
    struct image_map *map;
    struct image_file *file;
};

/* 0, or an errno. */
int image_write(FILE *out, const struct loaded *all);
int image_read(FILE *in, struct loaded *all);

#endif
