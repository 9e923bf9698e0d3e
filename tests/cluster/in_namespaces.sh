#!/bin/sh
# Runs a command in namespaces of its own (processes, network, mounts), where a Ray cluster can disturb nobody and
# leaves nothing behind, and HEADRACE_IN_NAMESPACES says so. Where that is not allowed, runs it as it is: the
# tests use ports and directories of their own in any case.
set -eu
kinds="--pid --net --mount --ipc --fork --kill-child --mount-proc"
[ "$(id -u)" = 0 ] || kinds="--user --map-root-user $kinds"
inside='ip link set lo up 2>/dev/null || ifconfig lo up; mount -t tmpfs tmpfs /dev/shm; export HEADRACE_IN_NAMESPACES=1; exec "$@"'
# shellcheck disable=SC2086
if unshare $kinds sh -c 'ip link set lo up 2>/dev/null || ifconfig lo up' 2>/dev/null; then
    exec unshare $kinds sh -c "$inside" sh "$@"
fi
exec "$@"
