"""A PKCS#11 library that hands all on to a real one, and kills IAM at a chosen call that changes the token.

AOSCORE_TEST_KILL names a file with a number N: at the Nth point (each changing call has one before and one after it)
the helper's parent gets SIGKILL, and the helper waits for its own end.
"""

import subprocess
from pathlib import Path

_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
typedef unsigned long word;
static struct { unsigned char version[2]; void *functions[68]; } real, spy;

static void point(void) {
    const char *name = getenv("AOSCORE_TEST_KILL");
    FILE *file = name ? fopen(name, "r+") : NULL;
    int left = 0;
    if (!file) return;
    if (fscanf(file, "%d", &left) == 1 && left > 0) {
        rewind(file);
        fprintf(file, "%d \n", left - 1);
        fflush(file);
        if (left == 1) {
            kill(getppid(), SIGKILL);
            for (;;) pause();
        }
    }
    fclose(file);
}

#define CALL(index, ...) word result; point(); \
    result = ((word (*)())real.functions[index])(__VA_ARGS__); point(); return result
static word init_token(word slot, void *pin, word size, void *label) { CALL(9, slot, pin, size, label); }
static word init_pin(word session, void *pin, word size) { CALL(10, session, pin, size); }
static word create(word session, void *attributes, word count, word *handle) {
    CALL(20, session, attributes, count, handle);
}
static word destroy(word session, word handle) { CALL(22, session, handle); }
static word generate(word session, void *how, void *public, word count, void *private, word number, word *one,
                     word *other) {
    CALL(59, session, how, public, count, private, number, one, other);
}

word C_GetFunctionList(void **result) {
    void *library = dlopen(REAL, RTLD_NOW);
    word (*get)(void **) = library ? (word (*)(void **))dlsym(library, "C_GetFunctionList") : NULL;
    void *list;
    if (!get || get(&list)) return 5;
    memcpy(&real, list, sizeof real);
    spy = real;
    spy.functions[9] = (void *)init_token;
    spy.functions[10] = (void *)init_pin;
    spy.functions[20] = (void *)create;
    spy.functions[22] = (void *)destroy;
    spy.functions[59] = (void *)generate;
    *result = &spy;
    return 0;
}
"""


def build_spy(directory: Path, real: Path) -> Path:
    """The library."""
    target = directory / "libspy.so"
    options = ["-shared", "-fPIC", "-w", f'-DREAL="{real}"', "-x", "c", "-", "-o", str(target), "-ldl"]
    subprocess.run(["cc", *options], input=_SOURCE, text=True, check=True, capture_output=True)
    return target
