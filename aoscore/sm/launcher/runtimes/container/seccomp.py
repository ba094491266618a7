"""The default seccomp profile: what no service needs and an attacker would like (sm-runtime.md §7, D31).

A list of refusals, not of permissions: system calls that newer C libraries begin to use keep working, and services
written for AosCore 9.1, which has no filter at all, do too. Together with "no new privileges" and three capabilities
this closes the kernel's management interfaces and nested user namespaces.
"""

import errno
from typing import Any

_ARCHITECTURES = {
    "x86_64": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
    "aarch64": ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
}

_REFUSED = (
    # modules, other kernels, programs inside the kernel
    *("init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "bpf", "perf_event_open"),
    # mounts and namespaces
    *("mount", "umount", "umount2", "mount_setattr", "move_mount", "open_tree", "fsopen", "fsconfig", "fsmount"),
    *("fspick", "pivot_root", "unshare", "setns", "open_by_handle_at"),
    # keys, clocks, the machine as a whole
    *("add_key", "keyctl", "request_key", "adjtimex", "clock_adjtime", "clock_settime", "settimeofday", "stime"),
    *("reboot", "swapon", "swapoff", "acct", "quotactl", "quotactl_fd", "sethostname", "setdomainname", "syslog"),
    *("ioperm", "iopl", "uselib", "ustat", "sysfs", "_sysctl", "lookup_dcookie", "nfsservctl", "vm86", "vm86old"),
    # interfaces with a long record of privilege escalation
    *("userfaultfd", "io_uring_setup", "io_uring_enter", "io_uring_register", "process_vm_readv", "process_vm_writev"),
    *("kcmp", "modify_ldt"),
)

_CLONE_NEWUSER = 0x10000000


def default_profile(machine: str) -> dict[str, Any]:
    """The OCI ``linux.seccomp`` object for a machine name as of uname(2)."""
    profile: dict[str, Any] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [
            {"names": list(_REFUSED), "action": "SCMP_ACT_ERRNO", "errnoRet": errno.EPERM},
            {
                "names": ["clone"],
                "action": "SCMP_ACT_ERRNO",
                "errnoRet": errno.EPERM,
                "args": [
                    {
                        "index": 0,
                        "value": _CLONE_NEWUSER,
                        "valueTwo": _CLONE_NEWUSER,
                        "op": "SCMP_CMP_MASKED_EQ",
                    }
                ],
            },
            # Its flags are behind a pointer and cannot be looked at; C libraries fall back to clone.
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSYS},
        ],
    }
    if machine in _ARCHITECTURES:
        profile["architectures"] = _ARCHITECTURES[machine]
    return profile
