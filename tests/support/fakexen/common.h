/* Stand-ins for Xen's devices: what the real libxenvchan sees of them is played with files below $FAKEXEN_DIR.
 *
 *   page-REF            a granted page
 *   port-PORT           an event channel: the socket of its owner and the number of the port at the other end, 0: none yet
 *   notify-DOMAIN-PID-REF  what the kernel does when process PID ends: clear the byte at OFFSET of the page, signal PORT
 *   store/PATH          a key of xenstore
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define PAGE 4096L
#define NUMBERS 100000

static inline const char *domain(void)
{
    const char *number = getenv("FAKEXEN_DOMAIN");
    return number ? number : "0";
}

/* A kind of files of this process. Domains may number their processes each for itself. */
static inline void process_kind(char *kind, size_t size, const char *name)
{
    snprintf(kind, size, "%s-%s-%d", name, domain(), (int)getpid());
}

/* A path below the folder, in memory of the caller's. */
static inline const char *in_folder(char *path, size_t size, const char *kind, unsigned number)
{
    const char *root = getenv("FAKEXEN_DIR");
    if (snprintf(path, size, "%s/%s-%u", root ? root : ".", kind, number) >= (int)size)
        abort();
    return path;
}

/* The first free number of a kind, taken by making its file. */
static inline int take_number(const char *kind, unsigned *number)
{
    char path[256];
    for (*number = 1; *number < NUMBERS; ++*number) {
        int file = open(in_folder(path, sizeof path, kind, *number), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        if (file >= 0 || errno != EEXIST)
            return file;
    }
    errno = ENOSPC;
    return -1;
}
