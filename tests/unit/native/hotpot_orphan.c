/* Programs of libhotpot whose service is killed. `keep`: says "begins", waits for a line (the service has gone by then),
 * and checks what is left of a dataset. `storm`: threads open and close datasets until an error or SIGBUS ends them. */
#include "hotpot_check.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGES = 64, PAGE = 4096, THREADS = 4 };

static sigjmp_buf back;
static char *volatile where;

static void noticed(int number, siginfo_t *about, void *context)
{
    (void)number, (void)context;
    where = about->si_addr;
    siglongjmp(back, 1);
}

/* A load there gets SIGBUS. */
static void lost(const volatile char *at)
{
    if (sigsetjmp(back, 1) == 0) {
        (void)*at;
        CHECK(!"a byte was read");
    }
    CHECK(where == at);
}

static int keep(void)
{
    struct HP_dataset d;
    struct sigaction action = {.sa_sigaction = noticed, .sa_flags = SA_SIGINFO};
    int status;

    CHECK(HP_create("set", PAGES * PAGE, NULL) == 0 && HP_open("set", &d) == 0);
    strcpy(d.memory, "kept");
    struct HP_range range = {0, 5};
    CHECK(HP_commit_ranges(&d, &range, 1, 1) == 0);
    puts("begins");
    fflush(stdout);
    while (getchar() != '\n')
        ;
    sigaction(SIGBUS, &action, NULL);
    CHECK(strcmp(d.memory, "kept") == 0);
    strcpy(d.memory, "mine"); /* a commit had taken the right to store there */
    for (int page = 1; page < PAGES; page += 2)
        lost(d.memory + page * PAGE + page);
    CHECK(strcmp(d.memory, "mine") == 0);
    CHECK(HP_commit_ranges(&d, &range, 1, 1) == HP_ERR_NOT_CONNECTED);
    pid_t child = fork();
    if (child == 0)
        _exit(HP_close(&d) == HP_ERR_NOT_CONNECTED ? 0 : 1);
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    lost(d.memory + 2 * PAGE);
    CHECK(HP_close(&d) == HP_ERR_NOT_CONNECTED);
    puts("ends");
    return 0;
}

static void *again(void *name)
{
    static int turns;
    for (;;) {
        struct HP_dataset d;
        CHECK(HP_open(name, &d) == 0);
        for (int i = 0; i < 5; i++) {
            CHECK(d.memory[rand() % (PAGES * PAGE)] == 0);
            d.memory[rand() % (PAGES * PAGE)] = 0;
        }
        CHECK(HP_close(&d) == 0);
        if (__atomic_add_fetch(&turns, 1, __ATOMIC_RELAXED) == 100) {
            puts("begins");
            fflush(stdout);
        }
    }
    return NULL;
}

static int storm(void)
{
    static char names[THREADS][8];
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++) {
        snprintf(names[i], sizeof names[i], "set%d", i);
        CHECK(HP_create(names[i], PAGES * PAGE, NULL) == 0);
        CHECK(pthread_create(&threads[i], NULL, again, names[i]) == 0);
    }
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    return 0;
}

int main(int argc, char **argv)
{
    CHECK(argc == 2 && HP_connect() == 0);
    return strcmp(argv[1], "keep") ? storm() : keep();
}
