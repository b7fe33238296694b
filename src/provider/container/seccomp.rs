//! The system calls that a container may not make: those that reach the kernel
//! itself or other processes, and those that make new namespaces, which would
//! expose more of the kernel. They fail with EPERM, as if the caller lacked the
//! right.
//!
//! The list is what container engines deny by default and package managers do
//! without; `docs/explanation/isolation.md` says the same.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
};

const DENIED: &[i64] = &[
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_adjtimex,
    libc::SYS_bpf,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_finit_module,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_init_module,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_ioperm,
    libc::SYS_iopl,
    libc::SYS_kcmp,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_lookup_dcookie,
    libc::SYS_mount,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    libc::SYS_perf_event_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pivot_root,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_setns,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_syslog,
    libc::SYS_umount2,
    libc::SYS_unshare,
    libc::SYS_userfaultfd,
    libc::SYS_uselib,
    libc::SYS_ustat,
    libc::SYS_vhangup,
];

/// Flags with which `clone` makes a namespace.
const NAMESPACES: [i32; 7] = [
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWNS,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWUTS,
];

/// Socket families that are allowed.
const SOCKETS: [i32; 4] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];

/// linux/audit.h
const AUDIT_ARCH_X86_64: u32 = 0xC000_003E;

/// Makes the filter as the kernel expects it.
pub(super) fn filter() -> Result<Vec<u8>, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = DENIED.iter().map(|call| (*call, Vec::new())).collect();
    let clone = NAMESPACES
        .iter()
        .map(|flag| {
            let flag = *flag as u64;
            let set = SeccompCondition::new(0, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(flag), flag)?;
            SeccompRule::new(vec![set])
        })
        .collect::<Result<Vec<_>, _>>()?;
    rules.insert(libc::SYS_clone, clone);
    // These inject characters into a terminal's input.
    let inject = |command: u64| {
        SeccompRule::new(vec![SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, command)?])
    };
    rules.insert(libc::SYS_ioctl, vec![inject(libc::TIOCSTI)?, inject(libc::TIOCLINUX)?]);
    // Sockets of other families reach the hypervisor, drivers and unusual
    // protocols, which no layer needs.
    let foreign = SOCKETS
        .iter()
        .map(|family| SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, *family as u64))
        .collect::<Result<Vec<_>, _>>()?;
    rules.insert(libc::SYS_socket, vec![SeccompRule::new(foreign)?]);
    let denied: BpfProgram = SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EPERM as u32),
        TargetArch::x86_64,
    )?
    .try_into()?;
    // Two rules that seccompiler can't express come first: calls of the x32 ABI
    // have other numbers, and `clone3` hides its flags in memory. Without it
    // the C library uses `clone`.
    let (load, equal, not_less, answer) = (0x20, 0x15, 0x35, 0x06);
    let error = |number: i32| 0x0005_0000 | number as u32;
    // A program of another architecture finds a kernel without its calls:
    // `struct seccomp_data` begins with the number, then the architecture.
    let mut program = vec![
        statement(load, 0, 0, 4),
        statement(equal, 1, 0, AUDIT_ARCH_X86_64),
        statement(answer, 0, 0, error(libc::ENOSYS)),
        statement(load, 0, 0, 0),
        statement(not_less, 0, 1, 0x4000_0000),
        statement(answer, 0, 0, error(libc::ENOSYS)),
        statement(equal, 0, 1, libc::SYS_clone3 as u32),
        statement(answer, 0, 0, error(libc::ENOSYS)),
    ];
    program.extend(denied);
    Ok(program
        .iter()
        .flat_map(|s| {
            let mut bytes = s.code.to_ne_bytes().to_vec();
            bytes.extend([s.jt, s.jf]);
            bytes.extend(s.k.to_ne_bytes());
            bytes
        })
        .collect())
}

fn statement(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_filter_is_a_program_within_the_kernels_limit() {
        let bytes = super::filter().unwrap();
        assert_eq!(bytes.len() % 8, 0);
        assert!(bytes.len() / 8 < 4096, "BPF_MAXINSNS");
    }
}
