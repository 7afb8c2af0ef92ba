#!/usr/bin/env bats
# Tests of the set-up scripts with real changes, in a bare guest: scripts/lab run --bare --cxl 512M -- bats tests/hw-setup/lab.bats
# Each script goes from not ready to ready and back.

bats_require_minimum_version 1.5.0

setup() {
    cd "$BATS_TEST_DIRNAME/../.." || exit
    [ "${LAB_BARE:-}" = yes ] || { echo "these tests change the host: run them in scripts/lab run --bare"; return 1; }
    export EMBARCADERO_STATE=/run/embarcadero
}

# there_and_back SCRIPT OPTIONS...: checks that `apply` makes the host ready, and that `undo` reverts it.
there_and_back() {
    local script=hw-setup/$1
    shift
    run -1 "$script" check "$@"
    run -0 "$script" apply "$@"
    run -0 "$script" check "$@"
    run -0 "$script" apply "$@"
    [[ $output == *"nothing to change"* ]]
    run -0 "$script" undo
    run -1 "$script" check "$@"
}

@test "deps: everything is installed" {
    run -0 hw-setup/deps check --purpose lab
}

@test "soft-roce" {
    there_and_back soft-roce --interface d0 --mtu 4500
    [ "$(cat /sys/class/net/d0/mtu)" = 1500 ]
    [ ! -e /sys/class/infiniband/rxe0 ]
}

@test "hugepages" {
    there_and_back hugepages --count 40 --node 0 --mount /run/huge
    [ "$(cat /sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages)" = 0 ]
    [ ! -e /run/huge ]
}

@test "more huge pages than there is room for: refused, undone" {
    run -1 hw-setup/hugepages apply --count 100000 --mount none
    [[ $output == *"the kernel found room for"* ]]
    run -0 hw-setup/hugepages undo
    [ "$(cat /sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages)" = 0 ]
}

@test "cxl as device-dax, for a group" {
    there_and_back cxl --group disk
    run -0 hw-setup/cxl apply --group disk
    [ "$(stat -c '%G %a' /dev/dax0.0)" = "disk 660" ]
    run -0 hw-setup/cxl undo
}

@test "cxl as system-ram" {
    there_and_back cxl --mode system-ram
}

@test "everything for soft-RoCE, and then the quickstart over verbs on /dev/dax0.0" {
    run -0 hw-setup/all apply --profile soft-roce
    run -0 hw-setup/all check --profile soft-roce
    run -0 scripts/quickstart --program target/release/embarcadero --transport verbs --region /dev/dax0.0 --megabytes 4
    [[ $output == *"every line came back"* ]]
    run -0 hw-setup/all undo --profile soft-roce
    [ ! -e /dev/dax0.0 ]
}
