#!/bin/sh
# vchan-permissions.sh SERVER CLIENT: run in Dom0 after the client guest was started, and after each start of it.
#
# SERVER and CLIENT are domain names; a server in Dom0 needs none of this. Makes the xenstore folder in which the server's
# MP announces its two vchans, and lets the client, and nobody else, read it. A guest has a new number after each start,
# so the permissions and the number that the server is told are set anew each time.
set -eu

[ $# = 2 ] || { echo "usage: $0 SERVER CLIENT" >&2; exit 2; }
server=$(xl domid "$1")
client=$(xl domid "$2")
home=/local/domain/$server/data/vchan/aos

for path in "/local/domain/$server/data/vchan" "$home" "$home/rx" "$home/tx"; do
    xenstore-write "$path" ""
    # The first entry names the owner and what everybody else may do: nothing.
    xenstore-chmod "$path" "n$server" "r$client"
done
# Who the server grants its pages to, which cannot look up names.
xenstore-write "$home/peer" "$client"
xenstore-chmod "$home/peer" "n$server"
