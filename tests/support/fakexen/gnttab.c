/* Grants: a file per page, mapped shared by both ends. */
#include "common.h"

typedef struct handle {
    char notify[256];
} handle;

static void *map(unsigned count, const uint32_t *refs)
{
    char path[256];
    char *base = mmap(NULL, count * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED)
        return NULL;
    for (unsigned index = 0; index < count; index++) {
        int file = open(in_folder(path, sizeof path, "page", refs[index]), O_RDWR | O_CLOEXEC);
        void *page = file < 0 ? MAP_FAILED
                              : mmap(base + index * PAGE, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0);
        if (file >= 0)
            close(file);
        if (page == MAP_FAILED) {
            munmap(base, count * PAGE);
            return NULL;
        }
    }
    return base;
}

static void remember(handle *one, uint32_t ref, uint32_t offset, uint32_t port)
{
    char kind[32];
    process_kind(kind, sizeof kind, "notify");
    int file = open(in_folder(one->notify, sizeof one->notify, kind, ref), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (file < 0)
        abort();
    dprintf(file, "%u %u %u\n", ref, offset, port);
    close(file);
}

static int forget(handle *one)
{
    if (one->notify[0])
        unlink(one->notify);
    free(one);
    return 0;
}

handle *xengntshr_open(void *logger, unsigned flags) { return calloc(1, sizeof(handle)); }
int xengntshr_close(handle *one) { return forget(one); }

void *xengntshr_share_pages(handle *one, uint32_t peer, int count, uint32_t *refs, int writable)
{
    for (int index = 0; index < count; index++) {
        int file = take_number("page", &refs[index]);
        if (file < 0 || ftruncate(file, PAGE))
            return NULL;
        close(file);
    }
    return map(count, refs);
}

void *xengntshr_share_page_notify(handle *one, uint32_t peer, uint32_t *ref, int writable, uint32_t offset, uint32_t port)
{
    void *page = xengntshr_share_pages(one, peer, 1, ref, writable);
    if (page)
        remember(one, *ref, offset, port);
    return page;
}

int xengntshr_unshare(handle *one, void *pages, uint32_t count) { return munmap(pages, count * PAGE); }

handle *xengnttab_open(void *logger, unsigned flags) { return calloc(1, sizeof(handle)); }
int xengnttab_close(handle *one) { return forget(one); }

void *xengnttab_map_domain_grant_refs(handle *one, uint32_t count, uint32_t peer, uint32_t *refs, int protection)
{
    return map(count, refs);
}

void *xengnttab_map_grant_ref_notify(handle *one, uint32_t peer, uint32_t ref, int protection, uint32_t offset, uint32_t port)
{
    void *page = map(1, &ref);
    if (page)
        remember(one, ref, offset, port);
    return page;
}

int xengnttab_unmap(handle *one, void *pages, uint32_t count) { return munmap(pages, count * PAGE); }
