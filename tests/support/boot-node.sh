#!/bin/sh
# boot-node.sh NAME DIR BRIDGE LOWER CGROUP [OPTION]: boots DIR (an overlay on LOWER) as a machine of its own with systemd in it.
# What testbed.md §6 found necessary: a terminal for systemd, a control group version 2 tree, a few system calls.
set -e
name=$1 dir=$2 bridge=$3 lower=$4 group=/sys/fs/cgroup/$5 option=$6
exec script -qec "unshare --mount sh -c '
    mount -t overlay overlay -o lowerdir=$lower,upperdir=$dir/upper,workdir=$dir/work $dir/root
    umount -R /sys/fs/cgroup
    mount -t cgroup2 none /sys/fs/cgroup
    mkdir -p $group
    echo \$\$ > $group/cgroup.procs
    exec systemd-nspawn --register=no --keep-unit --quiet --directory=$dir/root --machine=$name \
        --network-bridge=$bridge $option --resolv-conf=off --timezone=off --capability=all \
        --system-call-filter=\"add_key keyctl bpf quotactl\" --boot'" /dev/null
