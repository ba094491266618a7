/* xenstore: a file per key. No watches, and transactions that are nothing. */
#include <dirent.h>

#include "common.h"

static const char *key(char *place, size_t size, const char *path)
{
    const char *root = getenv("FAKEXEN_DIR");
    int length = path[0] == '/' ? snprintf(place, size, "%s/store%s", root ? root : ".", path)
                                : snprintf(place, size, "%s/store/local/domain/%s/%s", root ? root : ".", domain(), path);
    if (length >= (int)size)
        abort();
    return place;
}

void *xs_open(unsigned long flags) { return malloc(1); }
void xs_close(void *store) { free(store); }

void *xs_read(void *store, uint32_t transaction, const char *path, unsigned *length)
{
    char place[512];
    if (!strcmp(path, "domid")) {
        if (length)
            *length = strlen(domain());
        return strdup(domain());
    }
    int file = open(key(place, sizeof place, path), O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return NULL;
    char *value = calloc(1, 256);
    ssize_t count = read(file, value, 255);
    close(file);
    if (count < 0) {
        free(value);
        return NULL;
    }
    if (length)
        *length = count;
    return value;
}

bool xs_write(void *store, uint32_t transaction, const char *path, const void *data, unsigned length)
{
    char place[512], next[520];
    key(place, sizeof place, path);
    for (char *part = strchr(place + 1, '/'); part; part = strchr(part + 1, '/')) {
        *part = 0;
        mkdir(place, 0700);
        *part = '/';
    }
    snprintf(next, sizeof next, "%s.new", place);
    int file = open(next, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    bool done = file >= 0 && write(file, data, length) == (ssize_t)length;
    if (file >= 0)
        close(file);
    return done && !rename(next, place);
}

bool xs_rm(void *store, uint32_t transaction, const char *path)
{
    static const char *const names[] = {"ring-ref", "event-channel"};
    char place[512], name[540];
    key(place, sizeof place, path);
    for (int index = 0; index < 2; index++) {
        snprintf(name, sizeof name, "%s/%s", place, names[index]);
        unlink(name);
    }
    return true;
}

char **xs_directory(void *store, uint32_t transaction, const char *path, unsigned *count)
{
    char place[512];
    DIR *folder = opendir(key(place, sizeof place, path));
    *count = 0;
    if (!folder)
        return NULL;
    /* One block of memory, as the caller frees it: pointers first, then the names. */
    enum { MOST = 256, LONGEST = 64 };
    char **names = calloc(MOST, sizeof(char *) + LONGEST);
    char *text = (char *)(names + MOST);
    for (struct dirent *entry; *count < MOST && (entry = readdir(folder));)
        if (entry->d_name[0] != '.' && strlen(entry->d_name) < LONGEST) {
            names[*count] = text + *count * LONGEST;
            strcpy(names[(*count)++], entry->d_name);
        }
    closedir(folder);
    return names;
}

bool xs_set_permissions(void *store, uint32_t transaction, const char *path, void *permissions, unsigned count)
{
    return true;
}

uint32_t xs_transaction_start(void *store) { return 1; }
bool xs_transaction_end(void *store, uint32_t transaction, bool abort) { return true; }
