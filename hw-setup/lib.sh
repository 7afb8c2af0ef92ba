# shellcheck shell=bash
# What the set-up scripts share. Source it; it sets no options of its own.

# say TEXT...: progress, on standard error.
say() { printf '== %s\n' "$*" >&2; }

# die TEXT...: a sentence, and the end.
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# as_root COMMAND...: runs it as root, with sudo if need be.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "this needs root: $*"
    fi
}
