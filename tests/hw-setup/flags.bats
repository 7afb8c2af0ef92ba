#!/usr/bin/env bats
# Tests of the set-up scripts on any host, without root and without hardware: options, errors, the output of --dry-run, and undo
# after a failed change.

bats_require_minimum_version 1.5.0

setup() {
    cd "$BATS_TEST_DIRNAME/../.." || exit
    export EMBARCADERO_STATE=$BATS_TEST_TMPDIR/state
    unset interface name mtu
}

# A script with three changes, of which the second fails if the file `fail` exists.
toy() {
    mkdir -p "$BATS_TEST_TMPDIR/toy"
    cp hw-setup/lib.sh "$BATS_TEST_TMPDIR/toy/lib.sh"
    # The scripts need root; this one pretends, because it changes only its own directory.
    cat >"$BATS_TEST_TMPDIR/toy/toy" <<END
#!/usr/bin/env bash
set -euo pipefail
. "$BATS_TEST_TMPDIR/toy/lib.sh"
id() { echo 0; }
here=$BATS_TEST_TMPDIR/toy
check() { finding "files" "\$(is test -e "\$here/c")" "a \"quoted\" thing" "hw-setup/toy apply"; }
step() { [ ! -e "\$here/fail" ] && touch "\$here/b"; }
apply() {
    [ -e "\$here/a" ] || change "rm \$here/a" touch "\$here/a"
    [ -e "\$here/b" ] || change "rm \$here/b" step
    [ -e "\$here/c" ] || change "rm \$here/c" touch "\$here/c"
}
main "\$@"
END
    chmod +x "$BATS_TEST_TMPDIR/toy/toy"
    toy=$BATS_TEST_TMPDIR/toy/toy
}

@test "each script has --help, and refuses unknown verbs and options" {
    for script in deps soft-roce rdma hugepages cxl dpdk tune services; do
        run -0 "hw-setup/$script" --help
        [[ $output == *"usage: hw-setup/$script"*"--dry-run"* ]]
        run -2 "hw-setup/$script"
        run -2 "hw-setup/$script" mend
        run -1 "hw-setup/$script" check --colour blue
        [[ $output == *"has no option --colour"* ]]
        run -1 "hw-setup/$script" check something
        [[ $output == *"unexpected 'something'"* ]]
    done
    run -1 hw-setup/hugepages check --count
    [[ $output == *"--count needs a value"* ]]
    run -1 hw-setup/hugepages check --count many
    [[ $output == *"--count is 'many'; it must be a whole number"* ]]
    run -1 hw-setup/hugepages check --size 4M
    [[ $output == *"--size is '4M'; it must be one of: 2M 1G"* ]]
    run -1 hw-setup/hugepages check --node 99
    [[ $output == *"no pages of 2M on node 99"* ]]
    run -1 hw-setup/cxl check --mode fsdax
    [[ $output == *"it must be one of: devdax system-ram"* ]]
    run -1 hw-setup/soft-roce check --interface nosuch0
    [[ $output == *"there is no interface nosuch0"* ]]
    run -1 hw-setup/deps check --purpose fun
    [[ $output == *"it must be one of: basic build dpdk test lab compare"* ]]
    run -1 hw-setup/rdma check --device nosuch0
    [[ $output == *"there is no RDMA device nosuch0"* ]]
    run -1 hw-setup/dpdk check --device 0000:ff:1f.7
    [[ $output == *"there is no PCI device"* ]]
    run -1 hw-setup/tune apply --dry-run --what speed
    [[ $output == *"--what has 'speed'"* ]]
    run -1 hw-setup/tune apply --dry-run --what irq
    [[ $output == *"irq needs --cores"* ]]
    run -1 hw-setup/all check --profile mainframe
    [[ $output == *"it must be one of: laptop soft-roce rdma dpdk cxl"* ]]
    run -1 hw-setup/all check
    run -1 hw-setup/all mend --profile laptop
}

# Runs a command in a network namespace with a veth pair. Both end with the command.
with_veth() {
    unshare --net --mount -- bash -ec 'ip link add veth0 type veth peer name veth1
        ip link set veth0 up; ip link set veth1 up; ip address add 10.9.9.1/24 dev veth0
        ip route add default via 10.9.9.2 dev veth0
        mount -t sysfs none /sys
        "$@"' -- "$@"
}

@test "a virtual interface: no PCI device for DPDK, no soft-RoCE where the kernel has none" {
    [ "$(id -u)" = 0 ] || skip "namespaces need root"
    run -1 with_veth hw-setup/dpdk check --interface veth0
    [[ $output == *"veth0 is no PCI device"* ]]
    modinfo rdma_rxe >/dev/null 2>&1 || [ -d /sys/module/rdma_rxe ] || {
        run -1 with_veth hw-setup/soft-roce check
        [[ $output == *"has no soft-RoCE (module rdma_rxe)"*"veth0"* ]]
        run -1 with_veth hw-setup/soft-roce apply --interface veth0
        [[ $output == *"this kernel has no soft-RoCE"* ]]
    }
}

@test "all: one summary, and exit code 1 if any step is not ready" {
    run hw-setup/all check --profile laptop
    [[ $output == *"laptop, check:"*"ok   deps"* ]]
    run -0 hw-setup/all apply --profile cxl --dry-run
    [[ $output == *"cxl create-region"*"cxl, apply:"* ]]
}

@test "findings are JSON" {
    for script in deps soft-roce rdma hugepages cxl dpdk tune services; do
        run "hw-setup/$script" check --json
        python3 -c 'import json, sys
for finding in json.load(sys.stdin):
    assert set(finding) == {"name", "ready", "found", "advice"} and isinstance(finding["ready"], bool)' <<<"$output"
    done
    toy
    run -1 "$toy" check --json
    [ "$output" = '[{"name": "files", "ready": false, "found": "a \"quoted\" thing", "advice": "hw-setup/toy apply"}]' ]
}

@test "--dry-run prints the commands and changes nothing" {
    run -0 hw-setup/hugepages apply --dry-run --count 7 --mount "$BATS_TEST_TMPDIR/huge"
    [[ $output == *"+ mount -t hugetlbfs -o pagesize=2M none $BATS_TEST_TMPDIR/huge"* ]]
    [ ! -e "$BATS_TEST_TMPDIR/huge" ]
    run -0 hw-setup/cxl apply --dry-run --mode system-ram
    [[ $output == *"+ daxctl reconfigure-device -m system-ram --no-movable dax0.0"* ]]
    [ ! -e "$EMBARCADERO_STATE" ]
}

@test "apply and undo need root" {
    [ "$(id -u)" != 0 ] || command -v setpriv >/dev/null || skip "no way to be another user"
    as_nobody() {
        if [ "$(id -u)" = 0 ]; then setpriv --reuid 65534 --regid 65534 --clear-groups "$@"; else "$@"; fi
    }
    for script in soft-roce rdma hugepages cxl dpdk tune services; do
        run -1 as_nobody bash "hw-setup/$script" apply
        [[ $output == *"needs root"* ]]
        run -1 as_nobody bash "hw-setup/$script" undo
        [[ $output == *"needs root"* ]]
    done
}

@test "apply, apply again, undo" {
    toy
    run -0 "$toy" apply
    [[ $output == *"3 changes"* ]]
    run -0 "$toy" check
    run -0 "$toy" apply
    [[ $output == *"nothing to change"* ]]
    run -0 "$toy" undo --dry-run
    [ -e "$BATS_TEST_TMPDIR/toy/a" ]
    run -0 "$toy" undo
    [ "${lines[0]}" = "+ rm $BATS_TEST_TMPDIR/toy/c" ]
    [ ! -e "$BATS_TEST_TMPDIR/toy/a" ] && [ ! -e "$BATS_TEST_TMPDIR/toy/b" ] && [ ! -e "$BATS_TEST_TMPDIR/toy/c" ]
    run -0 "$toy" undo
    [[ $output == *"nothing to undo"* ]]
}

@test "after a failed change, undo reverts the changes before it" {
    toy
    touch "$BATS_TEST_TMPDIR/toy/fail"
    run -1 "$toy" apply
    [[ $output == *"step failed; hw-setup/toy undo reverts the changes before it"* ]]
    [ -e "$BATS_TEST_TMPDIR/toy/a" ]
    run -0 "$toy" undo
    [ ! -e "$BATS_TEST_TMPDIR/toy/a" ]
    [[ $output != *"rm $BATS_TEST_TMPDIR/toy/b"* ]]
}

@test "an undo that fails in part goes on and reports it" {
    toy
    run -0 "$toy" apply
    rm "$BATS_TEST_TMPDIR/toy/b"
    run -1 "$toy" undo
    [[ $output == *"that failed"* ]]
    [ ! -e "$BATS_TEST_TMPDIR/toy/a" ] && [ ! -e "$BATS_TEST_TMPDIR/toy/c" ]
}
