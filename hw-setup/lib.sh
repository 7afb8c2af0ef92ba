# shellcheck shell=bash
# Library of the set-up scripts. A script sources it, declares its options (`option`), defines the functions `check` (which
# reports with `finding`) and `apply` (which changes the host with `change`), and ends with `main "$@"`. The scripts in
# scripts/ use only `say` and `die`.

# say TEXT...: reports progress on standard error.
say() { printf '== %s\n' "$*" >&2; }

# die TEXT...: reports an error and exits.
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# need_root: exits unless run as root. A script with `elevate=yes` is started again with sudo instead.
elevate=no arguments=("$@")
need_root() {
    [ "$(id -u)" != 0 ] || return 0
    [ "$elevate" = no ] || ! command -v sudo >/dev/null || exec sudo -- "$0" "${arguments[@]}"
    die "hw-setup/$script ${arguments[0]} needs root; --dry-run shows what it would do"
}

script=$(basename "$0")
# File where `apply` records how to undo its changes: one shell command per line, the oldest change first.
state=${EMBARCADERO_STATE:-/var/lib/embarcadero/hw-setup}/$script.undo

option_names=() option_help=()
# option NAME HELP: declares --NAME VALUE. The variable NAME holds the default, then the value.
option() {
    option_names+=("$1")
    option_help+=("--$1 VALUE"$'\t'"$2${!1:+ (default ${!1})}")
}

usage() {
    cat <<END
usage: hw-setup/$script check|apply|undo [options]
  check   reports what is ready and what is not, and changes nothing; exit code 1 if anything is not ready
  apply   makes the host ready; a second run changes nothing
  undo    reverts the changes of apply
END
    printf '  %s\n' "--json"$'\t'"print the findings of check as JSON" "--dry-run"$'\t'"print the commands instead of running them" \
        "${option_help[@]}" | expand -t 24
}

# is COMMAND...: prints yes if the command succeeds, else no.
is() { if "$@" >/dev/null 2>&1; then echo yes; else echo no; fi; }

# require_number NAME: exits unless the option's value is a whole number.
require_number() {
    case ${!1} in '' | *[!0-9]*) die "--$1 is '${!1}'; it must be a whole number" ;; esac
}

# require_choice NAME CHOICE...: exits unless the option has one of these values.
require_choice() {
    local name=$1 choice
    shift
    for choice in "$@"; do [ "${!name}" != "$choice" ] || return 0; done
    die "--$name is '${!name}'; it must be one of: $*"
}

# require PROGRAM PACKAGE: exits unless the program, which `apply` needs, is installed.
require() { command -v "$1" >/dev/null || die "$1 is missing: install $2"; }

json_string() {
    local text=${1//\\/\\\\}
    text=${text//\"/\\\"}
    printf '"%s"' "$(printf '%s' "$text" | tr '\n\t' '  ' | tr -d '\000-\037')"
}

all_ready=yes findings=()
# finding NAME yes|no FOUND ADVICE: reports what was found, whether that is ready, and if not, what to do.
finding() {
    local advice=$4
    [ "$2" = no ] || advice=
    [ "$2" = yes ] || all_ready=no
    if [ "$json" = yes ]; then
        findings+=("{\"name\": $(json_string "$1"), \"ready\": $([ "$2" = yes ] && echo true || echo false), \
\"found\": $(json_string "$3"), \"advice\": $(json_string "$advice")}")
    else
        printf '%-4s %s: %s\n' "$([ "$2" = yes ] && echo ok || echo no)" "$1" "$3"
        [ -z "$advice" ] || printf '       %s\n' "$advice"
    fi
}

changes=0
# change UNDO COMMAND...: runs the command, or with --dry-run only prints it. Before, it records the shell command UNDO, which
# reverts the change; '-' if there is nothing to revert.
change() {
    local undo=$1
    shift
    changes=$((changes + 1))
    case $1 in
    put) printf '+ echo %q > %q\n' "$3" "$2" ;;
    quietly) printf '+ %s\n' "${*:2}" ;;
    *) printf '+ %s\n' "$*" ;;
    esac
    [ "$dry_run" = no ] || return 0
    need_root
    if [ "$undo" != - ]; then
        mkdir -p "$(dirname "$state")"
        printf '%s\n' "$undo" >>"$state"
    fi
    if ! "$@"; then
        [ "$undo" = - ] || sed -i '$d' "$state"
        die "$* failed$([ ! -s "$state" ] || printf '; hw-setup/%s undo reverts the changes before it' "$script")"
    fi
}

# change_named KEY UNDO COMMAND...: like change, for a command that creates something and prints its name as JSON under KEY.
# {} in UNDO stands for that name, so that undo removes exactly what was created.
change_named() {
    local key=$1 undo=$2 said name
    shift 2
    changes=$((changes + 1))
    printf '+ %s\n' "$*"
    [ "$dry_run" = no ] || return 0
    need_root
    said=$("$@") || die "$* failed$([ ! -s "$state" ] || printf '; hw-setup/%s undo reverts the changes before it' "$script")"
    name=$(json_value "$key" <<<"$said")
    [ -n "$name" ] || die "$* does not print the name of what it created"
    mkdir -p "$(dirname "$state")"
    printf '%s\n' "${undo//\{\}/$name}" >>"$state"
}

# json_value KEY: prints the first value of that key in JSON with one key per line, as cxl, ndctl and daxctl print it.
json_value() { tr -d ' ",' | awk -F: -v key="$1" '$1 == key {print $2; exit}'; }

# write_file PATH CONTENT: writes a file; exits if a file with other content is there.
write_file() {
    local path=$1 content=$2
    [ "$(cat "$path" 2>/dev/null)" != "$content" ] || return 0
    [ ! -e "$path" ] || die "$path exists with other content; move it away first"
    [ -d "$(dirname "$path")" ] || change - mkdir -p "$(dirname "$path")"
    change "rm -f $(printf %q "$path")" put "$path" "$content"
}

# write_value PATH VALUE: writes a kernel setting; undo restores the old value.
write_value() {
    local was
    was=$(cat "$1" 2>/dev/null) || die "this kernel has no $1"
    # Settings with several choices show the chosen one in brackets.
    case $was in *\[*\]*) was=${was#*\[} was=${was%%\]*} ;; esac
    [ "$was" != "$2" ] || return 0
    change "echo $(printf %q "$was") > $1" put "$1" "$2"
}

put() { printf '%s\n' "$2" >"$1"; }

# quietly COMMAND...: runs a program that prints much when it succeeds, without that output.
quietly() { "$@" >/dev/null; }

# load_module NAME...: loads kernel modules that are not loaded yet.
load_module() {
    local name
    for name in "$@"; do
        # A module that is built in may have no directory in /sys/module.
        [ -d "/sys/module/${name//-/_}" ] || [ "$(modinfo -F filename "$name" 2>/dev/null)" = "(builtin)" ] || change "modprobe -r $name || true" modprobe "$name"
    done
}

# has_module NAME: succeeds if the kernel module is loaded, built in or can be loaded.
has_module() { [ -d "/sys/module/${1//-/_}" ] || modinfo "$1" >/dev/null 2>&1; }

undo() {
    [ -s "$state" ] || { say "nothing to undo"; return 0; }
    local lines line failed=0
    mapfile -t lines <"$state"
    for ((line = ${#lines[@]} - 1; line >= 0; line--)); do
        printf '+ %s\n' "${lines[line]}"
        [ "$dry_run" = no ] || continue
        if ! bash -c "${lines[line]}"; then
            printf 'error: that failed; it is removed from the record\n' >&2
            failed=1
        fi
        sed -i '$d' "$state"
    done
    [ "$dry_run" = yes ] || rm -f "$state"
    return "$failed"
}

main() {
    # With underscores, so that no option has these names.
    local _verb=${1:-} _name _found
    json=no dry_run=no
    [ $# -eq 0 ] || shift
    while [ $# -gt 0 ]; do
        case $1 in
        --json) json=yes ;;
        --dry-run) dry_run=yes ;;
        --help) usage; exit 0 ;;
        --*)
            _found=
            for _name in "${option_names[@]}"; do
                if [ "$1" = "--$_name" ]; then
                    [ $# -gt 1 ] || die "$1 needs a value"
                    printf -v "$_name" '%s' "$2"
                    _found=yes
                    shift
                    break
                fi
            done
            [ -n "$_found" ] || die "hw-setup/$script has no option $1; try --help"
            ;;
        *) die "unexpected '$1'; try hw-setup/$script --help" ;;
        esac
        shift
    done
    case $_verb in
    check)
        check
        [ "$json" = no ] || printf '[%s]\n' "$(IFS=,; printf '%s' "${findings[*]}")"
        [ "$all_ready" = yes ]
        ;;
    apply)
        [ "$dry_run" = yes ] || [ "$elevate" = yes ] || need_root
        apply
        if [ "$changes" = 0 ]; then say "nothing to change"; elif [ "$dry_run" = no ]; then say "$changes changes"; fi
        ;;
    undo)
        [ "$dry_run" = yes ] || need_root
        undo
        ;;
    --help | -h) usage ;;
    *) usage >&2; exit 2 ;;
    esac
}
