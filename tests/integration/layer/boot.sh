#!/bin/sh
# Plays the initramfs up to the switch of roots: BASE is a directory with disk images, MODULES the modules to run.
# In a mount namespace of its own; a chroot has the host's programs, the images as devices, and a file as kernel log.
#
# What the booted system would see is copied to BASE/booted: the root's files, /var/machine-id, the mounts.
# With CUT=N everything ends without a word at the Nth program that writes something durable.
set -eu
base=$1
modules=$2
shift 2

root=$base/initramfs
mkdir -p "$root"
mount -t tmpfs tmpfs "$root"
for dir in usr dev proc rootfs run sys var etc images modules mnt tmp; do
	mkdir "$root/$dir"
done
for link in bin sbin lib lib64; do
	ln -s "usr/$link" "$root/$link"
done
mount --rbind /usr "$root/usr"
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount --bind "$base" "$root/images"
mount --bind "$modules" "$root/modules"
touch "$base/kmsg"
mount --bind "$base/kmsg" "$root/dev/kmsg"

cat >"$root/init" <<'INIT'
ROOTFS_DIR=/rootfs
hooks=""

add_module_pre_hook() {
	hooks="$hooks $1"
}

# Devices are image files: attached so that they may be remounted, and gone with the last mount.
mount() {
	for argument; do
		last_but_one=${last:-}
		last=$argument
	done
	case "$*" in
	*loop* | *bind* | *move* | *overlay* | *tmpfs* | *remount*)
		command mount "$@"
		;;
	*)
		device=$(losetup --find --show "$last_but_one") || return 1
		options=$(echo "$*" | sed "s,$last_but_one $last\$,,")
		# shellcheck disable=SC2086 # several options
		command mount $options "$device" "$last"
		mounted=$?
		losetup --detach "$device"
		return $mounted
		;;
	esac
}

if [ -n "${CUT:-}" ]; then
	count=0
	# A cut is a kill: nothing after it runs, no trap and no clean-up.
	cut() {
		count=$((count + 1))
		[ "$count" -ne "$CUT" ] || kill -9 $$
	}
	for name in mv rm rsync umount; do
		eval "$name() { cut; command $name \"\$@\"; }"
	done
	sync() { cut; }
else
	sync() { :; }
fi

rootfs_run() {
	mount -o ro "$bootparam_root" "$ROOTFS_DIR"
}

finish_run() {
	rm -rf /images/booted
	mkdir /images/booted
	cp -a "$ROOTFS_DIR/." /images/booted/root
	command mount >/images/booted/mounts
	echo "$ROOTFS_DIR" >/images/booted/where
}

for file in $(cd /modules && ls); do
	while [ "${file%%-*}" -gt 90 ] && [ -z "${rooted:-}" ]; do
		rootfs_run
		rooted=yes
	done
	module=${file#*-}
	for hook in $hooks; do
		$hook pre "$module"
	done
	. "/modules/$file"
	if "${module}_enabled"; then
		"${module}_run"
	fi
done
[ -n "${rooted:-}" ] || rootfs_run
for hook in $hooks; do
	$hook pre finish
done
finish_run
INIT
exec chroot "$root" env "$@" PATH=/usr/sbin:/usr/bin:/sbin:/bin sh /init
