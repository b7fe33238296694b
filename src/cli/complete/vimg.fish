function __vimg_complete
    set -l words (commandline -opc) (commandline -ct)
    $words[1] __complete -- $words[2..] 2>/dev/null
end
complete -c vimg -f -a '(__vimg_complete)'
complete -c vimg -n 'test -z "$(__vimg_complete)"' -F
