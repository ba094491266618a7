"""PKCS#11 libraries with faults that a real one does not have when asked, made with the C compiler."""

import subprocess
from pathlib import Path

_SOURCE = r"""
#include <stdio.h>
#include <unistd.h>
typedef unsigned long word;
static word ok(void) { return 0; }
static word not_supported(void) { return 0x54; }
static word list(unsigned char present, word *slots, word *count) {
    (void)present;
    if (slots) slots[0] = 7;
    *count = 1;
    return 0;
}
static word crash(void) { *(volatile int *)0 = 1; return 0; }
static word hang(void) { for (;;) pause(); }
static word full(void) { return 0x31; }
static word chatty(void) { puts("{\"error\": \"me\"}"); fflush(stdout); return 0; }
static struct { unsigned char version[2]; void *functions[68]; } table;
word C_GetFunctionList(void **result) {
    for (int i = 0; i < 68; i++) table.functions[i] = (void *)not_supported;
    table.functions[0] = (void *)ok;
    table.functions[1] = (void *)ok;
    table.functions[4] = (void *)list;
    table.functions[6] = (void *)FAULT;
    *result = &table;
    return 0;
}
"""
_FUNCTIONS = {"crash": "crash", "hang": "hang", "full": "full", "print": "chatty"}


def build_library(directory: Path, fault: str) -> Path:
    """A library that does this when it is asked about its token: crash, hang, full, print."""
    target = directory / f"lib{fault}.so"
    if not target.exists():
        command = ["cc", "-shared", "-fPIC", "-w", f"-DFAULT={_FUNCTIONS[fault]}", "-x", "c", "-", "-o", str(target)]
        subprocess.run(command, input=_SOURCE, text=True, check=True, capture_output=True)
    return target
