#!/bin/bash
# A SLURM cluster on one machine: `hosts.sh FOLDER NODE…`, as process 1 of namespaces of its own, made by slurm.py.
#
# Mounts, network, processes and the host's name are private, so nothing of it is seen outside or can meet another
# instance, and all of it is gone when this process ends. It ends when its standard input does: with whoever started it.
set -euo pipefail
folder=$1
shift

mount -t tmpfs none /run  # munge's socket and the names of network namespaces
mkdir -m 755 /run/munge
{ echo "127.0.0.1 localhost"; echo "10.99.0.254 ctl"; } >"$folder/hosts"
hostname ctl
ip link set lo up
ip link add br0 type bridge
ip address add 10.99.0.254/24 dev br0
ip link set br0 up
i=0
for node in "$@"; do
  i=$((i + 1))
  echo "10.99.0.$i $node" >>"$folder/hosts"
  ip netns add "$node"
  ip link add "to-$node" type veth peer name eth0 netns "$node"
  ip link set "to-$node" master br0 up
  ip -n "$node" link set lo up
  ip -n "$node" address add "10.99.0.$i/24" dev eth0
  ip -n "$node" link set eth0 up
done
mount --bind "$folder/hosts" /etc/hosts
munged --key-file="$folder/munge.key" --log-file="$folder/munged.log" \
  --pid-file=/run/munge/munged.pid --seed-file=/run/munge/seed --force

# not `ip netns exec`: it mounts /sys anew, without the control groups that slurmd looks for
for node in "$@"; do
  nsenter --net="/run/netns/$node" unshare --uts --pid --mount --fork --kill-child --mount-proc bash "$folder/node.sh" "$node" \
    </dev/null >>"$folder/$node.out" 2>&1 &
done
slurmctld -D -f "$folder/slurm.conf" </dev/null >>"$folder/slurmctld.out" 2>&1 &
echo up
cat >/dev/null || true
