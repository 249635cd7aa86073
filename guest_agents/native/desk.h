/* `split`'s side of its conversation with the process monitor (splitkernel/process/desk.py documents it). */
#ifndef RACKLESS_DESK_H
#define RACKLESS_DESK_H

#include <stdbool.h>

#ifndef MONITOR_SOCKET /* tests have their own */
#define MONITOR_SOCKET "/run/rackless/split.sock"
#define VNODE "/vnode"
#endif

enum { USAGE = 2, INTERNAL = 70, CHECKPOINTED = 75, NOT_STARTED = 125, CANNOT_RUN = 126, NOT_FOUND = 127, MESSAGE = 64 << 10 };

/* One line on standard error, and the end. */
_Noreturn void die(int status, const char *format, const char *a, const char *b);

/* One request: whether it was granted; what the answer says (without "ok ", "error N ") in `text`. */
bool request(int monitor, char text[MESSAGE]);

/* One that must be granted. */
void ask(int monitor, char text[MESSAGE]);

/* A socket to the process monitor. */
int attach_monitor(void);

#endif
