//! Tests of the parts that need no KVM.

use super::*;

#[test]
fn huge_pages_are_read_from_sys() {
    let mm = std::env::temp_dir().join(format!("rvmm-info-{}", std::process::id()));
    let write = |path: &str, text: &str| {
        let path = mm.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    write("transparent_hugepage/enabled", "always [madvise] never\n");
    write("hugepages/hugepages-1048576kB/nr_hugepages", "0\n");
    write("hugepages/hugepages-1048576kB/free_hugepages", "0\n");
    write("hugepages/hugepages-2048kB/nr_hugepages", "16\n");
    write("hugepages/hugepages-2048kB/free_hugepages", "3\n");
    let info = hugepages(&mm);
    fs::remove_dir_all(&mm).unwrap();
    assert_eq!(info.transparent.as_deref(), Some("madvise"));
    assert_eq!(info.reserved.len(), 2);
    let pool = &info.reserved[0];
    assert_eq!(
        (pool.size, pool.total, pool.free),
        (ByteSize::mib(2), 16, 3)
    );
    assert!(hugepages(Path::new("/nope")).reserved.is_empty());
}

#[test]
fn text_tells_all_of_it() {
    let extension = |name, can_be_off| ExtensionInfo {
        name,
        on: true,
        can_be_off,
    };
    let info = Info {
        rvmm: "1",
        kernel: "6.12".into(),
        kvm: BTreeMap::from([("IRQFD", 1)]),
        gpa_bits: 59,
        g_stage: g_stage(59),
        max_vcpus: 1024,
        aia: None,
        hart: HartInfo {
            isa: "rv64i".into(),
            mmu: "riscv,sv39",
            timebase: 10_000_000,
            extensions: vec![extension("d", true), extension("zbb", false)],
        },
        sbi: vec![extension("dbcn", true)],
        legacy_sbi_console: false,
        hugepages: HugePageInfo::default(),
        bugs: bugs(&Found {
            lossy: None,
            legacy_unsafe: false,
            sign_extends: false,
            loses_illegal: true,
            scounteren: Some(7),
        }),
    };
    let text = info.to_string();
    for part in [
        "Linux 6.12",
        "Sv57x4, 59-bit",
        "no AIA",
        "10000000 Hz",
        "turns off:\n  d\n",
        "always on:\n  zbb\n",
        "imsic-upper-half     does not apply",
        "mmio-zero-extends    FOUND",
        "lost-illegal         FOUND",
        "scounteren-zero      not here",
    ] {
        assert!(text.contains(part), "{part:?} in {text}");
    }
    let json = serde_json::to_value(&info).unwrap();
    assert_eq!(json["bugs"][1]["present"], true);
    assert_eq!(json["hart"]["extensions"][0]["can_be_off"], true);
}
