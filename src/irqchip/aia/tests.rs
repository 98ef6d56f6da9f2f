//! Saves and loads the AIA of a fake host.

use std::cell::Cell;

use super::*;
use crate::hypervisor::fake::{FakeAia, FakeVm};
use crate::snapshot::testing::survives;
use crate::util::sync::lock;

const PLACEMENT: Placement = Placement {
    aplic: GuestAddress(0x0d00_0000),
    imsic: GuestAddress(0x2800_0000),
};

/// A host by its interrupt files. AUTO has guest interrupt files, but a hart gets one only when its
/// vCPU runs.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Host {
    Auto,
    Emul,
    /// As [`Host::Emul`], with a KVM that loses nothing.
    Mended,
}

const NOTHING: [&str; 0] = [];

/// An AIA of two harts, and its host.
struct Rig {
    fake: FakeAia,
    aia: InKernelAia,
}

impl Rig {
    fn new(host: Host, promise: Option<Promise>) -> Self {
        let fake = FakeAia {
            has_guest_files: host == Host::Auto,
            is_lossy: host != Host::Mended,
            ..FakeAia::default()
        };
        let vm = Arc::new(FakeVm {
            aia: Some(fake.clone()),
            ..FakeVm::default()
        });
        let device = Box::new(fake.clone());
        let aia = InKernelAia::start(vm, device, PLACEMENT, 2, false, promise).unwrap();
        Self { fake, aia }
    }

    /// Lets both harts have guest interrupt files.
    fn run(&self) {
        lock(&self.fake.files).extend([0, 1]);
    }

    /// Does what a guest does: sources of each kind, and interrupts that are enabled and pending.
    fn set_up(self) -> Self {
        let device = &*self.aia.aia;
        for (register, value) in [
            // Source 9 is a level and stays pending although its input falls.
            (4 * 9, 6),
            // Source 11 is a level, and sends identity 9 to hart 1.
            (4 * 11, 6),
            (0x3000 + 4 * 11, (1 << 18) | 9),
            // Source 33 is an edge, pending and not enabled; 36 is enabled and not pending.
            (4 * 33, 4),
            (4 * 36, 5),
            (0x3000 + 4 * 36, 17),
            (0x1c04, 1 << 1),
            (0x1e00, 1 << 11),
            (0x1e04, 1 << 4),
            (0, 1 << 8),
        ] {
            device.set_aplic(register, value).unwrap();
        }
        for (source, high) in [(9, true), (9, false), (11, true)] {
            self.aia.set_level(source, high);
        }
        for (hart, register, value) in [
            (0, EIDELIVERY, 1),
            (0, EIE0, (1 << 3) | (1 << 9) | (1 << 31)),
            (1, EITHRESHOLD, 7),
            (1, EIE0 + 2, 1 << 3),
        ] {
            device.set_imsic(hart, register, value).unwrap();
        }
        for (hart, identity) in [(0, 2), (0, 31), (0, 40), (1, 64)] {
            self.signal(hart, identity);
        }
        self
    }

    fn signal(&self, hart: u64, data: u32) {
        let address = PLACEMENT.imsic.0 + hart * IMSIC_SIZE;
        let message = MsiMessage { address, data };
        self.aia.vm.signal_msi(message).unwrap();
    }

    fn save(&self) -> Parts {
        Parts::new(Device::save(&self.aia).unwrap())
    }

    fn state(&self) -> AiaState {
        self.save().take().unwrap()
    }

    fn load(&self, state: &AiaState) -> std::result::Result<(), String> {
        let mut parts = Parts::new(vec![Saved::of(state).unwrap()]);
        Device::load(&self.aia, &mut parts).map_err(|error| error.to_string())
    }

    /// Gives the AIA state that it refuses before it changes anything, and returns the line.
    fn refuses(&self, state: &AiaState) -> String {
        lock(&self.fake.steps).clear();
        let before = lock(&self.fake.imsics).clone();
        let line = self.load(state).unwrap_err();
        assert_eq!(*lock(&self.fake.steps), NOTHING, "{line}");
        assert_eq!(*lock(&self.fake.imsics), before, "{line}");
        line
    }

    fn to_settle(&self, state: &AiaState) -> Vec<u32> {
        let mut parts = Parts::new(vec![Saved::of(state).unwrap()]);
        self.aia.to_settle_before_load(&mut parts).unwrap()
    }
}

#[test]
fn hart_bits_number_every_hart() {
    for (harts, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (512, 9)] {
        assert_eq!(hart_bits(harts), bits, "{harts} harts");
    }
}

#[test]
fn all_values_survive() {
    for host in [Host::Auto, Host::Emul, Host::Mended] {
        let saved = Cell::new(false);
        // The first one has been used by a guest. The others are new.
        let make = || {
            let rig = Rig::new(host, None);
            rig.run();
            if saved.replace(true) {
                return Box::new(rig.aia);
            }
            let rig = rig.set_up();
            // If the APLIC sent messages, no source could be both enabled and pending.
            rig.aia.aia.set_aplic(0, 0).unwrap();
            Box::new(rig.aia)
        };
        let promise = ["/identities", "/sources", "/whole"];
        // The list of a wire has one length.
        let lists = ["/imsics", "/wires/0", "/wires/1", "/wires/2", "/wires/3"];
        survives(make, &[&promise[..], &lists].concat());
    }
}

#[test]
fn what_the_guest_set_comes_back() {
    for (from, to) in [
        (Host::Auto, Host::Auto),
        (Host::Emul, Host::Emul),
        (Host::Emul, Host::Auto),
        (Host::Mended, Host::Auto),
        (Host::Auto, Host::Mended),
    ] {
        let first = Rig::new(from, None).set_up();
        first.run();
        let mut parts = first.save();
        let second = Rig::new(to, Some(Promise::of(&mut parts).unwrap()));
        // The device of source 11 sets its line before the AIA is loaded.
        second.aia.set_level(11, true);
        lock(&second.fake.steps).clear();
        let state = first.state();
        second.load(&state).unwrap();
        let steps = lock(&second.fake.steps).clone();
        assert_eq!(steps.last().unwrap(), "APLIC 0x0 = 0x100");
        assert!(!steps.iter().any(|step| step.contains("0x3000 ")), "genmsi");
        second.run();
        assert_eq!(second.state(), state, "{from:?} {to:?}");
        let sources: Vec<_> = state.wires.iter().map(|wire| wire.source).collect();
        assert_eq!(sources, [9, 11, 33, 36]);
        let pending: Vec<_> = state.wires.iter().map(|wire| wire.pending).collect();
        assert_eq!(pending, [true, false, true, false]);
        let [one, other] = &state.imsics[..] else {
            panic!("{state:?}")
        };
        // KVM does not show that 40 is pending in an emulated file.
        let hidden = if from == Host::Emul { 2 } else { 3 };
        assert_eq!(one.enabled, [3, 9, 31]);
        assert_eq!(one.pending, [2, 31, 40][..hidden]);
        let (enabled, pending) = (&other.enabled, &other.pending);
        assert_eq!((&enabled[..], &pending[..]), (&[67][..], &[9, 64][..]));
        assert!(one.delivers && other.threshold == 7);
    }
}

#[test]
fn a_file_that_is_not_shown_is_not_saved() {
    let rig = Rig::new(Host::Auto, None);
    assert!(rig.aia.to_settle_before_save().unwrap().is_empty(), "new");
    let rig = rig.set_up();
    assert_eq!(rig.aia.to_settle_before_save().unwrap(), [0, 1]);
    lock(&rig.fake.files).insert(0);
    assert_eq!(rig.aia.to_settle_before_save().unwrap(), [1]);
    let line = Device::save(&rig.aia).unwrap_err().to_string();
    assert!(
        line.contains("no guest interrupt file for hart 1"),
        "{line}"
    );
    rig.run();
    assert!(rig.aia.to_settle_before_save().unwrap().is_empty());
    rig.save();
    for host in [Host::Emul, Host::Mended] {
        let rig = Rig::new(host, None).set_up();
        assert!(rig.aia.to_settle_before_save().unwrap().is_empty());
    }
}

/// What a save tries out leaves the files as they are.
#[test]
fn a_save_changes_nothing() {
    for host in [Host::Auto, Host::Emul, Host::Mended] {
        let rig = Rig::new(host, None).set_up();
        rig.run();
        let registers = || {
            let mut registers = lock(&rig.fake.imsics).clone();
            registers.retain(|_, value| *value != 0);
            registers
        };
        let before = registers();
        rig.aia.to_settle_before_save().unwrap();
        rig.save();
        assert_eq!(registers(), before, "{host:?}");
    }
}

#[test]
fn enabled_identities_need_a_file_that_keeps_them() {
    let mut state = Rig::new(Host::Auto, None).state();
    // Messages set pending bits in every file.
    state.imsics[0].pending = vec![40];
    state.imsics[1].enabled = vec![5, 104];
    let hasty = Rig::new(Host::Auto, None);
    assert_eq!(hasty.to_settle(&state), [1]);
    let line = hasty.load(&state).unwrap_err();
    let expected = "cannot enable interrupt identity 104 of hart 1: it has no guest interrupt file";
    assert!(line.contains(expected), "{line}");
    let rig = Rig::new(Host::Auto, None);
    lock(&rig.fake.files).insert(1);
    rig.load(&state).unwrap();
    rig.run();
    assert_eq!(rig.state(), state);
    let mended = Rig::new(Host::Mended, Some(state.promise));
    assert!(mended.to_settle(&state).is_empty());
    mended.load(&state).unwrap();
    let line = Rig::new(Host::Emul, Some(state.promise)).refuses(&state);
    assert!(
        line.contains("needs a host with guest interrupt files"),
        "{line}"
    );
    state.promise.whole = false;
    for imsic in [0, 1] {
        let rig = Rig::new(Host::Emul, Some(state.promise));
        assert!(
            rig.refuses(&state).contains("guest interrupt files"),
            "hart {imsic}"
        );
        (state.imsics[imsic].enabled, state.imsics[imsic].pending) = (vec![5], vec![6]);
    }
    let rig = Rig::new(Host::Emul, Some(state.promise));
    rig.load(&state).unwrap();
    assert_eq!(rig.state(), state);
}

/// A device that is loaded before may already have sent one.
#[test]
fn messages_that_came_before_stay_pending() {
    let rig = Rig::new(Host::Auto, None);
    let mut state = rig.state();
    rig.signal(0, 40);
    state.imsics[0].pending = vec![3];
    rig.load(&state).unwrap();
    rig.run();
    assert_eq!(rig.state().imsics[0].pending, [3, 40]);
}

#[test]
fn what_the_aplic_missed_is_sent() {
    let rig = Rig::new(Host::Mended, None).set_up();
    // Source 36 is enabled, and sends identity 17 to hart 0.
    lock(&rig.fake.aplic).miss(36);
    let state = rig.state();
    assert!(
        state
            .wires
            .iter()
            .all(|wire| !(wire.enabled && wire.pending))
    );
    assert_eq!(state.imsics[0].pending, [2, 17, 31, 40]);
}

#[test]
fn a_guest_is_offered_what_it_was_promised() {
    let promise = Promise {
        identities: 127,
        sources: SOURCES_LOSSY,
        whole: false,
    };
    let rig = Rig::new(Host::Auto, Some(promise));
    assert!(lock(&rig.fake.steps).contains(&"Ids = 127".into()));
    assert_eq!(
        (rig.aia.identities(), rig.aia.sources()),
        (127, SOURCES_LOSSY)
    );
    assert_eq!(
        rig.aia.messages().vectors,
        LOSSY_IDENTITIES - RESERVED_IDENTITIES
    );
    let state = rig.state();
    assert_eq!(state.promise, promise);
    let told_else = Rig::new(Host::Auto, None).refuses(&state);
    assert!(told_else.contains("was promised"), "{told_else}");
    // A host with smaller files.
    let (identities, whole) = (511, true);
    let promise = Promise {
        identities,
        whole,
        ..promise
    };
    let rig = Rig::new(Host::Auto, Some(promise));
    assert_eq!(
        (rig.aia.identities(), rig.aia.messages().vectors),
        (255, 255 - RESERVED_IDENTITIES)
    );
    let line = rig.refuses(&AiaState { promise, ..state });
    assert_eq!(
        line,
        "the guest was given 511 interrupt identities, and this host has 255"
    );
}

#[test]
fn state_of_no_aia_is_refused() {
    let rig = Rig::new(Host::Mended, None);
    let refused = |change: &dyn Fn(&mut AiaState), line: &str| {
        let mut state = Rig::new(Host::Mended, None).set_up().state();
        change(&mut state);
        let found = rig.refuses(&state);
        assert!(found.contains(line), "{found}");
    };
    for identities in [0, 62, 64, 2111, u32::MAX] {
        let parts = |state: &AiaState| Parts::new(vec![Saved::of(state).unwrap()]);
        let promised = |state: &AiaState| Promise::of(&mut parts(state));
        let mut state = rig.state();
        state.promise.identities = identities;
        let line = promised(&state).unwrap_err().to_string();
        assert_eq!(
            line,
            format!("no IMSIC has {identities} interrupt identities")
        );
        state.promise = Promise {
            identities: 63,
            sources: 31,
            whole: true,
        };
        let line = promised(&state).unwrap_err().to_string();
        assert_eq!(line, "no APLIC of rvmm has 31 wired sources");
    }
    refused(
        &|state| drop(state.imsics.pop()),
        "the IMSICs of 1 harts, and this machine has 2",
    );
    refused(
        &|state| state.wires.swap(0, 1),
        "not ascending numbers from 1 to 63",
    );
    refused(&|state| state.wires[0].source = 0, "not ascending");
    refused(&|state| state.wires[3].source = 64, "not ascending");
    refused(&|state| state.wires[1].source = u32::MAX, "not ascending");
    refused(&|state| state.wires[0].mode = 8, "no APLIC can have");
    refused(
        &|state| state.wires[0].target = 1 << 11,
        "no APLIC can have",
    );
    refused(
        &|state| state.wires[0].enabled = true,
        "the message of wired source 9 was not sent",
    );
    for numbers in [vec![0], vec![256], vec![3, 3], vec![9, 8], vec![u32::MAX]] {
        let line = "the interrupt identities of hart 1 are not ascending numbers from 1 to 255";
        refused(&|state| state.imsics[1].enabled = numbers.clone(), line);
        refused(&|state| state.imsics[1].pending = numbers.clone(), line);
    }
    refused(
        &|state| state.imsics[0].threshold = 256,
        "the threshold of hart 0 is 256",
    );
}
