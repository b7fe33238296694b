#compdef vimg
_vimg() {
    local -a lines closed open
    lines=("${(@f)$("${(Q)words[1]}" __complete -- "${(@Q)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -z ${lines[1]} ]]; then
        _files
        return
    fi
    # More follows after these, so no space does.
    open=("${(@M)lines:#*[=:/]$'\t'*}")
    closed=("${(@)lines:#*[=:/]$'\t'*}")
    # `_describe` takes `value:description`.
    open=("${(@)${(@)open//:/\\:}/$'\t'/:}")
    closed=("${(@)${(@)closed//:/\\:}/$'\t'/:}")
    _describe vimg closed -- open -S ''
}
if [[ $funcstack[1] == _vimg ]]; then
    _vimg "$@"
else
    compdef _vimg vimg
fi
