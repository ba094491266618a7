#!/bin/sh
# dom0.sh XEN KERNEL INITRD DOM0_DISK [DISK...]: boots Xen with a Dom0 under QEMU, without hardware virtualization.
#
# XEN is the unpacked hypervisor, KERNEL and INITRD those of a Dom0 (Debian's linux-image-amd64, not the cloud kernel).
# The further disks appear as /dev/vdb, /dev/vdc, ... for the guests. Nothing is written to any of them.
# The console is on xen.serial.sock, its output also in xen.serial.log, both in the working directory.
set -eu

[ $# -ge 4 ] || { echo "usage: $0 XEN KERNEL INITRD DOM0_DISK [DISK...]" >&2; exit 2; }
xen=$1 kernel=$2 initrd=$3
shift 3
drives=
for disk in "$@"; do
    case $disk in *[\ ,]*) echo "$disk: a path with spaces or commas cannot be given to QEMU here" >&2; exit 2 ;; esac
    drives="$drives -drive file=$disk,if=virtio,snapshot=on"
done
# One processor that pretends little: with more, or with -cpu max, Dom0 hangs or crashes under emulation.
# shellcheck disable=SC2086  # the drives are words
exec qemu-system-x86_64 -accel tcg,thread=multi,tb-size=256 -machine q35 -cpu qemu64 -smp 1 -m 2400 \
    -display none -nodefaults -no-reboot -kernel "$xen" -append 'console=com1 com1=115200,8n1 dom0_mem=1024M' \
    -initrd "$kernel root=/dev/vda rw console=hvc0 net.ifnames=0 quiet,$initrd" $drives \
    -chardev socket,id=console,path=xen.serial.sock,server=on,wait=off,logfile=xen.serial.log -serial chardev:console
