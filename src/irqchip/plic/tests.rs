use std::collections::{BTreeMap, BTreeSet};

use super::core::Core;
use super::*;
use crate::hypervisor::fake::Wire;
use crate::snapshot::testing;

const PENDING: u64 = 0x1000;

fn enable(context: u64) -> u64 {
    0x2000 + 0x80 * context
}

fn threshold(context: u64) -> u64 {
    0x20_0000 + 0x1000 * context
}

fn claim(context: u64) -> u64 {
    threshold(context) + 4
}

fn read(core: &mut Core, offset: u64) -> u32 {
    let mut data = [0; 4];
    core.read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn write(core: &mut Core, offset: u64, value: u32) {
    core.write(offset, &value.to_le_bytes());
}

/// A PLIC for two harts. Source 10 has priority 3 and is enabled in context 1.
fn ready() -> Core {
    let mut core = Core::new(4);
    write(&mut core, 4 * 10, 3);
    write(&mut core, enable(1), 1 << 10);
    core
}

#[test]
fn a_level_interrupts_until_it_is_served() {
    let mut core = ready();
    core.set_level(10, true);
    assert!(core.delivers(1));
    assert!(!core.delivers(3));
    assert_eq!(read(&mut core, PENDING), 1 << 10);
    assert_eq!(read(&mut core, claim(1)), 10);
    assert!(!core.delivers(1));
    assert_eq!(read(&mut core, claim(1)), 0, "a request is claimed once");
    // The wire is still high at the completion, so the source becomes pending again.
    write(&mut core, claim(1), 10);
    assert!(core.delivers(1));
    assert_eq!(read(&mut core, claim(1)), 10);
    core.set_level(10, false);
    write(&mut core, claim(1), 10);
    assert!(!core.delivers(1));
}

#[test]
fn a_request_that_has_passed_stays() {
    let mut core = ready();
    core.set_level(10, true);
    core.set_level(10, false);
    assert!(core.delivers(1));
    assert_eq!(read(&mut core, claim(1)), 10);
    write(&mut core, claim(1), 10);
    assert!(!core.delivers(1));
}

#[test]
fn the_threshold_masks_delivery_but_no_claim() {
    let mut core = ready();
    core.set_level(10, true);
    write(&mut core, threshold(1), 3);
    assert!(!core.delivers(1), "priority 3 is not above threshold 3");
    write(&mut core, threshold(1), 2);
    assert!(core.delivers(1));
    write(&mut core, threshold(1), 7);
    assert_eq!(read(&mut core, claim(1)), 10);
}

#[test]
fn the_highest_priority_wins_then_the_lowest_number() {
    let mut core = Core::new(4);
    for (source, priority) in [(3, 1), (40, 5), (41, 5), (7, 0)] {
        write(&mut core, 4 * u64::from(source), priority);
        core.set_level(source, true);
    }
    for word in 0..3 {
        write(&mut core, enable(1) + 4 * word, !0);
    }
    let claims: Vec<u32> = (0..4).map(|_| read(&mut core, claim(1))).collect();
    assert_eq!(claims, [40, 41, 3, 0], "priority 0 never interrupts");
}

#[test]
fn two_harts_race_for_one_claim() {
    let mut core = ready();
    write(&mut core, enable(3), 1 << 10);
    core.set_level(10, true);
    assert!(core.delivers(1) && core.delivers(3));
    assert_eq!(read(&mut core, claim(3)), 10);
    assert!(!core.delivers(1));
    assert_eq!(read(&mut core, claim(1)), 0);
    // A context that has the source enabled may complete the claim of another context. Others may
    // not.
    write(&mut core, enable(1), 0);
    write(&mut core, claim(1), 10);
    assert!(!core.delivers(3), "still in service");
    write(&mut core, claim(3), 10);
    assert!(core.delivers(3));
}

#[test]
fn completion_without_claim_changes_nothing() {
    let mut core = ready();
    write(&mut core, claim(1), 10);
    core.set_level(10, true);
    write(&mut core, claim(1), 10);
    for hostile in [0, 9, 96, 1 << 31, u32::MAX] {
        write(&mut core, claim(1), hostile);
    }
    assert_eq!(read(&mut core, claim(1)), 10);
    assert_eq!(read(&mut core, claim(1)), 0);
}

#[test]
fn every_access_size_reads_and_writes_the_same_registers() {
    let mut core = ready();
    core.write(4 * 10, &[5]);
    assert_eq!(read(&mut core, 4 * 10), 5);
    core.write(4 * 10 + 1, &[0xff, 0xff]);
    assert_eq!(read(&mut core, 4 * 10), 5, "the upper bytes have no bits");
    core.write(enable(1) + 1, &[0xff]);
    assert_eq!(read(&mut core, enable(1)), 0xff00);
    core.write(enable(1), &[0xff; 8]);
    assert_eq!(read(&mut core, enable(1)), 0xffff_fffe, "source 0 is none");
    assert_eq!(read(&mut core, enable(1) + 4), !0);
    // An 8-byte load of threshold and claim.
    core.set_level(10, true);
    let mut both = [0; 8];
    core.read(threshold(1), &mut both);
    assert_eq!(u64::from_le_bytes(both), 10 << 32);
    // An access to the upper bytes only is no claim and no completion.
    let mut upper = [0xee];
    core.read(claim(1) + 1, &mut upper);
    core.write(claim(1) + 1, &[0]);
    assert_eq!(upper, [0]);
    core.write(claim(1), &[10]);
    assert_eq!(read(&mut core, claim(1)), 10);
}

#[test]
fn hostile_offsets_do_nothing() {
    let mut core = Core::new(4);
    let before = format!("{core:?}");
    let offsets = [0x1000, 0x1f000, SIZE - 4, SIZE, u64::MAX - 3, u64::MAX]
        .into_iter()
        .chain([
            0,
            4 * 96,
            enable(4),
            enable(1) + 0xc,
            threshold(4),
            claim(4),
            threshold(1) + 8,
        ]);
    for offset in offsets {
        for length in [1, 2, 4, 8] {
            let data = &mut [0; 8][..length];
            core.read(offset, data);
            assert!(data.iter().all(|byte| *byte == 0), "{offset:#x}");
            if !(offset == 0 && length == 8) {
                core.write(offset, &[0xff; 8][..length]);
            }
        }
    }
    for source in [0, 96, u32::MAX] {
        core.set_level(source, true);
    }
    assert_eq!(format!("{core:?}"), before);
}

#[test]
fn lines_are_set_only_when_they_change() {
    let (plic, wires) = with_wires(2);
    plic.write(4 * 10, &[1]);
    for context in 0..4 {
        plic.write(enable(context) + 1, &[4]);
    }
    plic.set_level(10, true);
    plic.set_level(10, true);
    let mut data = [0; 4];
    plic.read(claim(3), &mut data);
    assert_eq!(data, [10, 0, 0, 0]);
    for wire in &wires {
        assert_eq!(*lock(&wire.0), [true, false]);
    }
}

/// A PLIC for `harts` harts with the wires to the harts.
fn with_wires(harts: usize) -> (Plic, Vec<Arc<Wire>>) {
    let wires: Vec<Arc<Wire>> = (0..harts).map(|_| Arc::default()).collect();
    let lines = wires.iter().map(|wire| Arc::clone(wire) as _).collect();
    (Plic::new(0x0c00_0000, lines), wires)
}

/// A PLIC for two harts in which each kind of register has a value.
fn set_up() -> Plic {
    let (plic, _) = with_wires(2);
    plic.with_core(|core| {
        *core = ready();
        write(core, 4 * 95, 7);
        write(core, enable(3) + 8, 1 << 31);
        write(core, threshold(0), 5);
        for source in [10, 40, 95] {
            core.set_level(source, true);
        }
        assert_eq!(read(core, claim(3)), 95);
        core.set_level(40, false);
    });
    plic
}

#[test]
fn all_registers_survive() {
    let sizes = ["pending", "levels", "in_service", "enables", "contexts"];
    testing::survives(|| Box::new(set_up()), &sizes);
}

/// Loads what `from` saves into `into`.
fn load(from: &Plic, into: &Plic) -> Result<(), LoadError> {
    let mut parts = Parts::new(Device::save(from).unwrap());
    into.load(&mut parts)?;
    parts.finish()
}

#[test]
fn a_restored_plic_sets_every_line_once() {
    let (plic, wires) = with_wires(2);
    load(&set_up(), &plic).unwrap();
    assert_eq!(*lock(&wires[0].0), [true]);
    assert_eq!(*lock(&wires[1].0), [false], "KVM may have a stale level");
    plic.write(enable(1), &[0; 4]);
    plic.write(enable(3) + 1, &[4]);
    assert_eq!(*lock(&wires[0].0), [true, false]);
    assert_eq!(*lock(&wires[1].0), [false, true]);
}

/// The wires may be set before the PLIC's state is there. The state counts.
#[test]
fn what_was_before_does_not_matter() {
    let (plic, wires) = with_wires(2);
    plic.with_core(|core| *core = ready());
    plic.set_level(10, true);
    load(&with_wires(2).0, &plic).unwrap();
    assert_eq!(*lock(&wires[0].0), [true, false]);
    assert_eq!(*lock(&wires[1].0), [false]);
    let state = lock(&plic.state);
    assert_eq!(format!("{:?}", state.core), format!("{:?}", Core::new(4)));
}

fn refused(change: impl Fn(&mut Value)) -> String {
    let mut saved = Device::save(&set_up()).unwrap().remove(0);
    let mut state = serde_json::from_slice(&saved.json).unwrap();
    change(&mut state);
    saved.json = serde_json::to_vec(&state).unwrap();
    let error = set_up().load(&mut Parts::new(vec![saved])).unwrap_err();
    error.to_string()
}

#[test]
fn the_state_of_another_plic_is_refused() {
    let other = load(&set_up(), &with_wires(3).0).unwrap_err();
    assert_eq!(
        other.to_string(),
        "it has 6 contexts, and the snapshot has 4"
    );
    assert_eq!(
        refused(|state| state["priorities"] = "00".repeat(95).into()),
        "it has 96 priorities, and the snapshot has 95"
    );
    assert_eq!(
        refused(|state| state["contexts"][3]["threshold"] = 8.into()),
        "a priority or threshold is 8, and 7 is the limit"
    );
    assert_eq!(
        refused(|state| state["priorities"] = ("00".repeat(95) + "80").into()),
        "a priority or threshold is 128, and 7 is the limit"
    );
    let changes: [fn(&mut Value); 5] = [
        |state| state["priorities"] = ("01".to_owned() + &"00".repeat(95)).into(),
        |state| state["pending"][0] = 1.into(),
        |state| state["levels"][0] = 1.into(),
        |state| state["in_service"][0] = 1.into(),
        |state| state["contexts"][0]["enables"][0] = 1.into(),
    ];
    for change in changes {
        assert_eq!(
            refused(change),
            "there is state of source 0, which does not exist"
        );
    }
}

/// A model of the specification, made of sets, which is easy to compare with the text.
#[derive(Clone, Default)]
struct Model {
    priority: BTreeMap<u32, u32>,
    threshold: BTreeMap<u64, u32>,
    enabled: BTreeSet<(u64, u32)>,
    high: BTreeSet<u32>,
    pending: BTreeSet<u32>,
    in_service: BTreeSet<u32>,
}

impl Model {
    fn priority(&self, source: u32) -> u32 {
        self.priority.get(&source).copied().unwrap_or(0)
    }
    /// Lets requests pass their gateways.
    fn settle(&mut self) {
        let passing = self.high.difference(&self.in_service);
        self.pending.extend(passing);
    }
    /// The sources that are pending, enabled and of a priority above 0. The one that a claim
    /// returns first is the last.
    fn candidates(&self, context: u64) -> Vec<u32> {
        let mut sources: Vec<u32> = self.pending.iter().copied().collect();
        sources.retain(|s| self.enabled.contains(&(context, *s)) && self.priority(*s) > 0);
        sources.sort_by_key(|s| (self.priority(*s), std::cmp::Reverse(*s)));
        sources
    }
    fn delivers(&self, context: u64) -> bool {
        let threshold = self.threshold.get(&context).copied().unwrap_or(0);
        let mut sources = self.candidates(context).into_iter();
        sources.any(|source| self.priority(source) > threshold)
    }
    fn claim(&mut self, context: u64) -> u32 {
        let Some(source) = self.candidates(context).pop() else {
            return 0;
        };
        self.pending.remove(&source);
        self.in_service.insert(source);
        source
    }
    fn complete(&mut self, context: u64, source: u32) {
        if self.enabled.contains(&(context, source)) {
            self.in_service.remove(&source);
            self.settle();
        }
    }
}

/// Pseudo-random numbers, the same in each run (xorshift64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        u32::try_from(self.0 % u64::from(limit)).unwrap()
    }
}

const CONTEXTS: u32 = 6;

/// Does one random operation on both, and checks that the values a guest would see agree.
fn step(core: &mut Core, model: &mut Model, numbers: &mut Numbers) {
    // Mostly use a few sources, so that operations on the same source are frequent.
    let source = match numbers.below(4) {
        0 => numbers.below(SOURCES) + 1,
        _ => numbers.below(5) + 30,
    };
    let context = u64::from(numbers.below(CONTEXTS));
    match numbers.below(8) {
        0 | 1 => {
            let high = numbers.below(2) == 1;
            core.set_level(source, high);
            if high {
                model.high.insert(source);
            } else {
                model.high.remove(&source);
            }
            model.settle();
        }
        2 => {
            let priority = numbers.below(8);
            write(core, 4 * u64::from(source), priority);
            model.priority.insert(source, priority);
        }
        3 => {
            let limit = numbers.below(8);
            write(core, threshold(context), limit);
            model.threshold.insert(context, limit);
        }
        4 => {
            let register = enable(context) + 4 * u64::from(source / 32);
            let flipped = read(core, register) ^ (1 << (source % 32));
            write(core, register, flipped);
            if !model.enabled.remove(&(context, source)) {
                model.enabled.insert((context, source));
            }
        }
        5 | 6 => assert_eq!(read(core, claim(context)), model.claim(context)),
        _ => {
            // Mostly complete a source that is in service, sometimes any source.
            let served = model.in_service.iter().next().copied();
            let done = served.filter(|_| numbers.below(4) > 0).unwrap_or(source);
            write(core, claim(context), done);
            model.complete(context, done);
        }
    }
}

fn agree(core: &mut Core, model: &Model) {
    for context in 0..u64::from(CONTEXTS) {
        let index = usize::try_from(context).unwrap();
        assert_eq!(core.delivers(index), model.delivers(context), "{context}");
    }
    for word in 0..=SOURCES / 32 {
        let sources = model.pending.iter().filter(|source| **source / 32 == word);
        let expected = sources.fold(0, |bits, source| bits | (1 << (source % 32)));
        assert_eq!(read(core, PENDING + 4 * u64::from(word)), expected);
    }
}

/// The controller after it was saved and went on in a new machine. Its lines are as the model says.
fn moved(core: &Core, model: &Model) -> Core {
    let harts = CONTEXTS / 2;
    let (before, (after, wires)) = (with_wires(harts as usize).0, with_wires(harts as usize));
    lock(&before.state).core = core.clone();
    load(&before, &after).unwrap();
    for (hart, wire) in (0..).zip(wires) {
        assert_eq!(*lock(&wire.0), [model.delivers(2 * hart + 1)]);
    }
    lock(&after.state).core.clone()
}

/// Now and then the PLIC is saved, and goes on in a new machine.
#[test]
fn random_operations_agree_with_the_model() {
    const SEEDS: u64 = 50;
    const OPERATIONS: u32 = 1000;
    let (mut claims, mut masked) = (0, 0);
    for seed in 1..=SEEDS {
        let mut core = Core::new(CONTEXTS as usize);
        let (mut model, mut numbers) = (Model::default(), Numbers(seed * 0x9e37_79b9));
        for _ in 0..OPERATIONS {
            let before = model.in_service.len();
            if numbers.below(16) == 0 {
                core = moved(&core, &model);
            }
            step(&mut core, &mut model, &mut numbers);
            agree(&mut core, &model);
            claims += usize::from(model.in_service.len() > before);
            masked += (0..u64::from(CONTEXTS))
                .filter(|c| !model.candidates(*c).is_empty() && !model.delivers(*c))
                .count();
        }
    }
    // Check that the random walk had enough claims, and enough interrupts masked by a threshold.
    assert!(
        claims > 1000 && masked > 1000,
        "{claims} claims, {masked} masked"
    );
}
