#!/bin/sh
# boot-node.sh NAME DIR BRIDGE LOWER CGROUP [OPTION]: boots DIR (an overlay on LOWER) as a machine of its own with systemd in it.
# What the node writes is in DIR/own, or, where DIR/disk names a file, on the file system in that: see nspawn.py. With
# DIR/modules an initramfs says what the root is: see node-initramfs.sh.
# What testbed.md §6 found necessary: a terminal for systemd, a control group version 2 tree, a few system calls.
set -e
name=$1 dir=$2 bridge=$3 lower=$4 group=/sys/fs/cgroup/$5 option=$6
own=$dir/own attach=: root="echo $dir/root"
[ ! -d "$dir/modules" ] || root="sh $(dirname "$0")/node-initramfs.sh $dir"
if [ -e "$dir/disk" ]; then
    disk=$(cat "$dir/disk")
    # After a power cut it is being made.
    until [ -e "$disk" ]; do sleep 0.1; done
    attach="mount -o loop,noatime $disk $own"
fi
# It would pass on what systemd in the node has to say, to who does not listen: then systemd stands still.
unset NOTIFY_SOCKET
exec script -qec "unshare --mount sh -c '
    $attach
    mount -t overlay overlay -o lowerdir=$lower,upperdir=$own/upper,workdir=$own/work $dir/root
    root=\$($root)
    umount -R /sys/fs/cgroup
    mount -t cgroup2 none /sys/fs/cgroup
    mkdir -p $group
    echo \$\$ > $group/cgroup.procs
    exec systemd-nspawn --register=no --keep-unit --quiet --directory=\$root --machine=$name \
        --network-bridge=$bridge $option --resolv-conf=off --timezone=off --capability=all \
        --system-call-filter=\"add_key keyctl bpf quotactl\" --boot'" /dev/null
