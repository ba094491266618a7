/* Event channels: a datagram with the number of the port, to the socket of its owner. */
#include "common.h"

typedef struct handle {
    int socket;
    char path[108];
} handle;

static int counter;

static int look_up(uint32_t port, char *owner, uint32_t *peer)
{
    char path[256];
    FILE *file = fopen(in_folder(path, sizeof path, "port", port), "re");
    if (!file)
        return -1;
    int found = fscanf(file, "%107s %u", owner, peer);
    fclose(file);
    return found == 2 ? 0 : -1;
}

/* By rename: the other end never reads half of it. */
static int note(uint32_t port, const char *owner, uint32_t peer)
{
    char path[256], next[256], kind[32];
    process_kind(kind, sizeof kind, "next");
    FILE *file = fopen(in_folder(next, sizeof next, kind, port), "we");
    if (!file)
        return -1;
    fprintf(file, "%s %u\n", owner, peer);
    fclose(file);
    return rename(next, in_folder(path, sizeof path, "port", port));
}

static int make(const char *owner, uint32_t peer)
{
    unsigned port;
    int file = take_number("port", &port);
    if (file < 0)
        return -1;
    close(file);
    return note(port, owner, peer) ? -1 : (int)port;
}

handle *xenevtchn_open(void *logger, unsigned flags)
{
    handle *one = calloc(1, sizeof *one);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    char kind[32];
    process_kind(kind, sizeof kind, "events");
    in_folder(address.sun_path, sizeof address.sun_path, kind, __sync_add_and_fetch(&counter, 1));
    strcpy(one->path, address.sun_path);
    one->socket = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    unlink(one->path);
    if (one->socket < 0 || bind(one->socket, (void *)&address, sizeof address)) {
        free(one);
        return NULL;
    }
    return one;
}

int xenevtchn_close(handle *one)
{
    close(one->socket);
    unlink(one->path);
    free(one);
    return 0;
}

int xenevtchn_fd(handle *one) { return one->socket; }
int xenevtchn_bind_unbound_port(handle *one, uint32_t peer_domain) { return make(one->path, 0); }

int xenevtchn_bind_interdomain(handle *one, uint32_t peer_domain, uint32_t remote)
{
    char owner[108];
    uint32_t peer;
    if (look_up(remote, owner, &peer))
        return -1;
    int port = make(one->path, remote);
    return port < 0 || note(remote, owner, port) ? -1 : port;
}

int xenevtchn_notify(handle *one, uint32_t port)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    char owner[108];
    uint32_t peer, back;
    if (look_up(port, owner, &peer) || !peer || look_up(peer, owner, &back))
        return 0;
    strcpy(address.sun_path, owner);
    /* A full queue has events in it already: one more would say nothing new. */
    sendto(one->socket, &peer, sizeof peer, MSG_DONTWAIT, (void *)&address, sizeof address);
    return 0;
}

int xenevtchn_pending(handle *one)
{
    uint32_t port;
    return recv(one->socket, &port, sizeof port, 0) == sizeof port ? (int)port : -1;
}

int xenevtchn_unmask(handle *one, uint32_t port) { return 0; }
int xenevtchn_unbind(handle *one, uint32_t port) { return 0; }
