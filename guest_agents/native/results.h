/* What `split` brings from the process monitor when a program has ended: statistics, a trace. */
#ifndef RACKLESS_RESULTS_H
#define RACKLESS_RESULTS_H

#include <stdio.h>

/* Tell of the program's end. Whoever asked for no statistics (`file` is NULL) need not hear that the monitor was
 * restarted. */
void report(const char *file, int monitor, const char *job, double seconds, int status);

/* Where the trace will go; and a mark in the job's folder, by which its pagers know that they are to note things. */
FILE *begin_trace(const char *file, const char *job);
void end_trace(FILE *out, const char *file, int monitor, const char *job);

#endif
