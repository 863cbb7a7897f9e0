# bash completion for snapd-vm                                             -*- shell-script -*-

_snapd_vm() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]}
    local commands="create plan list delete revert disks methods get-method set-method daemon"
    local command="" domain="" word skip="" position=0 index
    COMPREPLY=()

    for ((index = 1; index < COMP_CWORD; index++)); do
        word=${COMP_WORDS[index]}
        if [[ -n $skip ]]; then
            skip=""
        elif [[ $word == --name || $word == --method || $word == --config ]]; then
            skip=1
        elif [[ $word == -* ]]; then
            continue
        elif [[ -z $command ]]; then
            command=$word
        else
            ((position++)) || domain=$word
        fi
    done

    case $prev in
        --method)
            _snapd_vm_methods "$cur"
            return ;;
        --config)
            mapfile -t COMPREPLY < <(compgen -f -- "$cur")
            return ;;
        --name)
            return ;;
    esac
    if [[ -z $command ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$commands --help --version" -- "$cur")
    elif [[ $cur == -* ]]; then
        local options="--help"
        case $command in
            create | plan) options+=" --json --name --method --quiesce-required --no-quiesce" ;;
            delete | revert) options+=" --json --no-wait" ;;
            list | disks | methods | get-method) options+=" --json" ;;
            set-method) options+=" --json --forget" ;;
            daemon) options+=" --config --thaw-held" ;;
        esac
        mapfile -t COMPREPLY < <(compgen -W "$options" -- "$cur")
    else
        # Names come from the service, if it runs and allows it; nobody is asked for a password.
        case $command:$position in
            create:0 | plan:0 | list:0 | disks:0 | [gs]et-method:0)
                _snapd_vm_words "$cur" domains ;;
            create:[1-9]* | plan:1 | [gs]et-method:1)
                _snapd_vm_words "$cur" disks "$domain" ;;
            set-method:2)
                _snapd_vm_methods "$cur" ;;
            delete:* | revert:0)
                _snapd_vm_words "$cur" snapshots ;;
        esac
    fi
}

_snapd_vm_methods() {
    mapfile -t COMPREPLY < <(compgen -W "btrfs lvm qemu rbd reflink zfs -" -- "$1")
    # One from outside: the service knows.
    ((${#COMPREPLY[@]})) || _snapd_vm_words "$1" methods
}

# The words that begin with $1; not by compgen -W, which would expand what a name holds.
_snapd_vm_words() {
    local cur=$1 word
    shift
    while IFS= read -r word; do
        [[ $word == "$cur"* ]] && COMPREPLY+=("$(printf %q "$word")")
    done < <("${COMP_WORDS[0]}" complete "$@" 2>/dev/null)
}

complete -F _snapd_vm snapd-vm
