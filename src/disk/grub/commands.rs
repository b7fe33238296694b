//! The commands that GRUB has.

/// The commands of GRUB 2.06 and 2.12, and those of Debian's patches.
const COMMANDS: &str = "\
    . [ acpi all_functional_test appleloader authenticate background_color background_image backtrace badram \
    blocklist boot break cat chainloader clear cmosclean cmosdump cmosset cmostest cmp configfile continue cpuid \
    crc cryptomount cutmem date devicetree distrust_certificate distrust_pubkey drivemap dump echo efi-exit \
    efifwsetup efitextmode eval exit export extract_entries_configfile extract_entries_source \
    extract_legacy_entries_configfile extract_legacy_entries_source false file fix_video freedos fwconfig \
    fwsetup getenv gettext gptsync halt hashsum hdparm hello help hexdump hexdump_random inb initrd initrd16 \
    initrdefi inl insmod inw keymap keystatus legacy_check_password legacy_configfile legacy_initrd \
    legacy_initrd_nounzip legacy_kernel legacy_password legacy_source linux linux16 linuxefi list_certificates \
    list_env list_pubkeys load_env loadfont loopback ls lsacpi lsapm lsefi lsefimmap lsefisystab lsfonts lsmmap \
    lsmod lspci lssal macppcbless mactelbless md5sum menuentry module module2 module_noverify multiboot \
    multiboot2 nativedisk net_add_addr net_add_dns net_add_route net_bootp net_bootp6 net_del_addr net_del_dns \
    net_del_route net_dhcp net_get_dhcp_option net_ipv6_autoconf net_ls_addr net_ls_cards net_ls_dns \
    net_ls_routes net_nslookup net_set_vlan normal normal_exit ntldr outb outl outw parttool password \
    password_pbkdf2 pcidump plan9 play probe pxechainloader rdmsr read read_byte read_dword read_word reboot \
    regexp return rmmod save_env search search.file search.fs_label search.fs_uuid search_fs_file \
    search_fs_uuid search_label sendkey serial set setparams setpci sha1sum sha256sum sha512sum shift shim_lock \
    sleep smbios source submenu suspend tcpdump terminal_input terminal_output terminfo test test_blockarg \
    testload testspeed time tr trigger_wait true trust trust_certificate truecrypt unset uppermem usb \
    usbtest vbeinfo vbetest verify_detached versioninfo videoinfo videotest wrmsr write_byte write_dword \
    write_word xen_hypervisor xen_initrd xen_linux xen_module xen_xsm xnu_boot xnu_devprop_load xnu_kernel \
    xnu_kernel64 xnu_kext xnu_kextdir xnu_mkext xnu_ramdisk xnu_resume xnu_splash xnu_uuid zfs-bootfs zfsinfo \
    zfskey kfreebsd kfreebsd_loadenv kfreebsd_module kfreebsd_module_elf knetbsd knetbsd_module \
    knetbsd_module_elf kopenbsd kopenbsd_ramdisk blscfg bls_import increment terminal hiddenentry";

/// Returns whether GRUB has a command of this name.
pub(super) fn has(name: &str) -> bool {
    COMMANDS.split_whitespace().any(|one| one == name)
}
