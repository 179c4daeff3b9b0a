/*
 * A program to be started by the tests.
 *
 *   probe dump [x ...]   what it was started with, to descriptor 1
 *   probe hold           until end of file on descriptor 0
 *   probe exit N
 *   probe kill N         by signal
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

extern char **environ;

static void
dump_fds(void)
{
    DIR *dir = opendir("/proc/self/fd");
    struct dirent *entry;

    while (dir && (entry = readdir(dir))) {
        char target[4096];
        int fd = atoi(entry->d_name);
        ssize_t n;

        if (entry->d_name[0] == '.' || fd == dirfd(dir))
            continue;
        n = readlinkat(dirfd(dir), entry->d_name, target, sizeof target - 1);
        target[n < 0 ? 0 : n] = 0;
        printf("fd %d %s\n", fd, target);
    }
    closedir(dir);
}

static void
dump_signals(void)
{
    FILE *status = fopen("/proc/self/status", "re");
    char line[256];

    while (status && fgets(line, sizeof line, status))
        if (!strncmp(line, "Sig", 3) && line[3] != 'Q')
            printf("%s", line);
    if (status)
        fclose(status);
}

static void
dump(int argc, char **argv)
{
    char cwd[4096];
    mode_t mask = umask(0);
    int deathsig = 0;

    /* First, before this process opens anything itself. */
    dump_fds();
    dump_signals();
    for (int i = 0; i < argc; i++)
        printf("arg %s\n", argv[i]);
    for (char **e = environ; *e; e++)
        printf("env %s\n", *e);
    printf("cwd %s\n", getcwd(cwd, sizeof cwd) ? cwd : "?");
    printf("umask %o\n", mask);
    printf("ids %d %d %d %d\n", getpid(), getppid(), getpgid(0), getsid(0));
    prctl(PR_GET_PDEATHSIG, &deathsig);
    printf("deathsig %d\n", deathsig);
    fflush(stdout);
}

int
main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    char byte;

    if (!strcmp(what, "dump"))
        dump(argc, argv);
    else if (!strcmp(what, "hold"))
        while (read(0, &byte, 1) > 0)
            ;
    else if (argc > 2 && !strcmp(what, "exit"))
        return atoi(argv[2]);
    else if (argc > 2 && !strcmp(what, "kill"))
        raise(atoi(argv[2]));
    else
        return 99;
    return 0;
}
