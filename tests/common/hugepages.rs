//! Huge pages that a case reserves. They belong to the whole host: only one case of a binary may
//! do so.

const RESERVED: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// Reserved huge pages. Dropped, the number from before is restored.
pub(crate) struct HugePages(String);

impl HugePages {
    pub(crate) fn reserve(count: u64) -> Self {
        let before = std::fs::read_to_string(RESERVED).expect("a host with hugetlb");
        std::fs::write(RESERVED, count.to_string()).expect("root reserves huge pages");
        let got = std::fs::read_to_string(RESERVED).expect("the number of pages");
        assert_eq!(got.trim(), count.to_string(), "the host has the memory");
        Self(before)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::fs::write(RESERVED, self.0.trim());
    }
}
