#!/bin/sh
# node-initramfs.sh DIR: an initramfs before a node boots, by its modules in DIR/modules; prints the root that is to be booted.
#
# In the mount namespace of the node, with the present root at DIR/root: it becomes read-only, as that of a device is.
# DIR/var.img is the disk of the node, made of its /var at the first boot: /var of all roots, and where updates lie.
# What the modules say is added to DIR/kmsg.
set -eu
dir=$1
disk=$dir/var.img
ram=$dir/ram

if [ ! -e "$disk" ]; then
	mke2fs -q -t ext4 -d "$dir/root/var" "$disk.new" 512M >&2
	mv "$disk.new" "$disk"
fi
# It may still be that of the last boot.
until [ -z "$(losetup --noheadings --associated "$disk")" ]; do
	sleep 0.1
done
device=$(losetup --find --show "$disk")

mkdir -p "$ram"
mount -t tmpfs tmpfs "$ram"
for name in usr dev proc rootfs run sys var modules tmp; do
	mkdir "$ram/$name"
done
for link in bin sbin lib lib64; do
	ln -s "usr/$link" "$ram/$link"
done
mount --rbind /usr "$ram/usr"
mount --rbind /dev "$ram/dev"
mount -t proc proc "$ram/proc"
mount --bind "$dir/modules" "$ram/modules"
touch "$dir/kmsg"
mount --bind "$dir/kmsg" "$ram/dev/kmsg"
mount --move "$dir/root" "$ram/rootfs"
mount -o remount,ro "$ram/rootfs"

cat >"$ram/init" <<'INIT'
ROOTFS_DIR=/rootfs
hooks=""

add_module_pre_hook() {
	hooks="$hooks $1"
}

for file in $(cd /modules && ls); do
	. "/modules/$file"
	if "${file#*-}_enabled"; then
		"${file#*-}_run"
	fi
done
for hook in $hooks; do
	$hook pre finish
done
echo "$ROOTFS_DIR" >/where
INIT
chroot "$ram" env PATH=/usr/sbin:/usr/bin:/sbin:/bin bootparam_vardir_disk="$device" \
	bootparam_aosupdate_disk="$device" bootparam_aosupdate_path=aos/workdirs/sm/runtimes/rootfs sh /init >&2
# Gone with the last mount.
losetup --detach "$device"
echo "$ram$(cat "$ram/where")"
