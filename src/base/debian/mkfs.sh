# A view of the chroot $1 without what is mounted in it, made a filesystem.
R=$1
V=$R/mnt
mount --bind "$R" "$V"
mount -t tmpfs -o mode=0755 none "$V/dev"
mount -t tmpfs -o mode=0755 none "$V/run"
mount -t tmpfs -o mode=1777 none "$V/tmp"
# The features are listed so that a newer host makes nothing that an older
# kernel, or GRUB, can't read.
mke2fs -q -F -t ext4 -b 4096 -I 256 -m 1 -i 16384 -U "$VIMG_ROOT_UUID" -L root \
    -O none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum \
    -E "offset=$VIMG_ROOT_OFFSET,lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0" \
    -d "$V" /proc/self/fd/100 "${VIMG_ROOT_KIB}k"
