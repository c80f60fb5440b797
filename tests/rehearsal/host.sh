#!/usr/bin/env bash
# The first process of a pretend machine, in namespaces of its own (hosts.py makes them):
#   host.sh FOLDER ADDRESS GATEWAY/BITS [PATH...]
# FOLDER holds home/, ssh/ and hosts.txt; each PATH stays where it is, though it may lie below the /root that becomes the
# machine's own. The rest of the file system is everyone's, as a shared folder would be. The machine is gone once nobody
# holds the other end of standard input.
set -euo pipefail
folder=$1 address=$2 gateway=$3
shift 3

mount --make-rprivate /
mount -t proc proc /proc
hostname "$(basename "$folder")"
mount -t tmpfs -o size=3g,mode=1777 tmpfs /dev/shm
mkdir -p /tmp/ray
mount -t tmpfs -o mode=1777 tmpfs /tmp/ray
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/sshd
for path in "$@"; do
    case $path in /root/*)
        mkdir -p "$folder/home/${path#/root/}"
        mount --rbind "$path" "$folder/home/${path#/root/}" ;;
    esac
done
mount --rbind "$folder/home" /root
hostname > "$folder/hostname"
mount --bind "$folder/hostname" /etc/hostname
mount --bind "$folder/../hosts.txt" /etc/hosts

ip link set lo up
until ip -o link show eth0 > /dev/null 2>&1; do sleep 0.05; done
ip addr add "$address/${gateway#*/}" dev eth0
ip link set eth0 up
ip route add default via "${gateway%/*}"
/usr/sbin/sshd -f "$folder/sshd_config" -E "$folder/sshd.log"
touch /run/ready

# bash waits for orphans while it reads
read -r _ || true
