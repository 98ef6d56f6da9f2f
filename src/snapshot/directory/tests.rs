use super::*;
use crate::snapshot::Saved;

/// A directory for one test, removed at its end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("rvmm-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn names(&self) -> Vec<String> {
        let names = fs::read_dir(&self.0).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn sections(text: &str) -> Vec<Section> {
    let saved = Saved {
        kind: "test".into(),
        version: 1,
        json: text.into(),
    };
    vec![Section {
        id: "test".into(),
        saved,
    }]
}

fn write(path: &Path, text: &str) -> Result<()> {
    let new = NewSnapshot::begin(path)?;
    let memory = new.create(MEMORY)?;
    (&memory).write_all(text.as_bytes())?;
    new.finish(&sections(text), &[memory])
}

fn assert_is(path: &Path, text: &str) {
    let there = Snapshot::open(path).unwrap();
    assert_eq!(there.sections, sections(text));
    let mut memory = String::new();
    there
        .file(MEMORY)
        .unwrap()
        .read_to_string(&mut memory)
        .unwrap();
    assert_eq!(memory, text);
}

#[test]
fn a_snapshot_is_there_when_it_is_finished() {
    let scratch = Scratch::new("whole");
    let path = scratch.0.join("one");
    let new = NewSnapshot::begin(&path).unwrap();
    assert_eq!(scratch.names(), [".one.unfinished"]);
    let again = NewSnapshot::begin(&path).err().unwrap();
    assert!(
        format!("{again:#}").contains("another process writes"),
        "{again:#}"
    );
    drop(new);
    assert!(scratch.names().is_empty());
    write(&path, "first").unwrap();
    assert_is(&path, "first");
    assert_eq!(scratch.names(), ["one"]);
}

#[test]
fn an_earlier_snapshot_stays_until_then() {
    let scratch = Scratch::new("earlier");
    let path = scratch.0.join("one");
    fs::create_dir(&path).unwrap();
    write(&path, "first").unwrap();
    let new = NewSnapshot::begin(&path).unwrap();
    let memory = new.create(MEMORY).unwrap();
    assert_is(&path, "first");
    let mapped = Snapshot::open(&path).unwrap().file(MEMORY).unwrap();
    new.finish(&sections("second"), &[memory]).unwrap();
    let there = Snapshot::open(&path).unwrap();
    assert_eq!(there.sections, sections("second"));
    assert_eq!(scratch.names(), ["one"]);
    let mut old = String::new();
    (&mapped).read_to_string(&mut old).unwrap();
    assert_eq!(old, "first", "who uses the old memory still has it");
}

#[test]
fn what_a_killed_process_left_is_removed() {
    let scratch = Scratch::new("killed");
    let hidden = scratch.0.join(".one.unfinished");
    fs::create_dir(&hidden).unwrap();
    fs::write(hidden.join(MEMORY), "half").unwrap();
    let path = scratch.0.join("one");
    assert!(Snapshot::open(&path).is_err());
    write(&path, "first").unwrap();
    assert_is(&path, "first");
    assert_eq!(scratch.names(), ["one"]);
}

#[test]
fn other_content_is_left_alone() {
    let scratch = Scratch::new("other");
    let refused = |path: &Path| format!("{:#}", write(path, "x").unwrap_err());
    let file = scratch.0.join("file");
    fs::write(&file, "mine").unwrap();
    assert!(refused(&file).contains("not a directory"));
    let full = scratch.0.join("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("state"), "mine, and long enough").unwrap();
    assert!(refused(&full).contains("other content"));
    assert!(refused(Path::new("relative")).contains("give the name"));
    assert!(refused(&scratch.0.join("no/such")).contains("No such file"));
    assert_eq!(scratch.names(), ["file", "full"]);
}

#[test]
fn what_is_no_snapshot_is_one_line() {
    let scratch = Scratch::new("none");
    let refused = |path: &Path| format!("{:#}", Snapshot::open(path).err().unwrap());
    assert!(refused(&scratch.0).contains("rvmm ctl snapshot"));
    fs::write(scratch.0.join(STATE), "elf").unwrap();
    assert!(refused(&scratch.0).ends_with("it is not a snapshot of rvmm"));
    let path = scratch.0.join("one");
    write(&path, "x").unwrap();
    fs::remove_file(path.join(MEMORY)).unwrap();
    let snapshot = Snapshot::open(&path).unwrap();
    let line = format!("{:#}", snapshot.file(MEMORY).err().unwrap());
    assert!(
        line.ends_with("No such file or directory (os error 2)"),
        "{line}"
    );
    fs::create_dir(path.join(MEMORY)).unwrap();
    let line = format!("{:#}", snapshot.file(MEMORY).err().unwrap());
    assert!(line.ends_with("not a regular file"), "{line}");
}

fn make_pipe(path: &Path) {
    use rustix::fs::{FileType, mknodat};
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
}

#[test]
fn a_snapshot_has_its_own_files() {
    let scratch = Scratch::new("own");
    let path = scratch.0.join("one");
    write(&path, "first").unwrap();
    let there = Snapshot::open(&path).unwrap();
    let moved = scratch.0.join("moved");
    fs::rename(&path, &moved).unwrap();
    write(&path, "second").unwrap();
    let mut memory = String::new();
    let mut file = there.file(MEMORY).unwrap();
    file.read_to_string(&mut memory).unwrap();
    assert_eq!(memory, "first");
    assert_eq!(there.read().unwrap(), sections("first"));
    fs::remove_dir_all(&moved).unwrap();
    let line = format!("{:#}", there.file(MEMORY).err().unwrap());
    assert!(line.ends_with("No such file or directory (os error 2)"));
}

#[test]
fn a_pipe_does_not_block() {
    let scratch = Scratch::new("pipes");
    let path = scratch.0.join("one");
    write(&path, "first").unwrap();
    let there = Snapshot::open(&path).unwrap();
    for name in [STATE, MEMORY] {
        fs::remove_file(path.join(name)).unwrap();
        make_pipe(&path.join(name));
        let line = format!("{:#}", there.file(name).err().unwrap());
        assert!(line.ends_with("it is not a regular file"), "{line}");
    }
    let line = format!("{:#}", write(&path, "second").unwrap_err());
    assert!(line.contains("other content"), "{line}");
}

/// A descriptor with which fsync(2) fails.
fn unsyncable(path: &Path) -> File {
    open_directory(path).unwrap().into()
}

#[test]
fn what_cannot_be_synced_is_undone() {
    let scratch = Scratch::new("unsynced");
    let path = scratch.0.join("one");
    let refused = || {
        let mut new = NewSnapshot::begin(&path).unwrap();
        new.parent = unsyncable(&scratch.0);
        let memory = new.create(MEMORY).unwrap();
        let error = new.finish(&sections("second"), &[memory]).unwrap_err();
        let line = format!("{error:#}");
        assert!(line.contains("Bad file descriptor"), "{line}");
    };
    refused();
    assert!(scratch.names().is_empty(), "{:?}", scratch.names());
    write(&path, "first").unwrap();
    refused();
    assert_is(&path, "first");
    assert_eq!(scratch.names(), ["one"]);
}

#[test]
fn the_earlier_snapshot_is_locked_before_it_is_hidden() {
    let scratch = Scratch::new("locked");
    let path = scratch.0.join("one");
    write(&path, "first").unwrap();
    let other = File::open(&path).unwrap();
    lock(&other).unwrap();
    let line = format!("{:#}", write(&path, "second").unwrap_err());
    assert!(line.contains("another process writes"), "{line}");
    assert_is(&path, "first");
    drop(other);
    write(&path, "second").unwrap();
    assert_is(&path, "second");
    assert_eq!(scratch.names(), ["one"]);
}

#[test]
fn a_leftover_may_have_any_content() {
    let scratch = Scratch::new("leftover");
    let hidden = scratch.0.join(".one.unfinished");
    fs::create_dir_all(hidden.join("a/b")).unwrap();
    fs::write(hidden.join("a/c"), "x").unwrap();
    std::os::unix::fs::symlink("..", hidden.join("up")).unwrap();
    let path = scratch.0.join("one");
    write(&path, "first").unwrap();
    assert_is(&path, "first");
    assert_eq!(scratch.names(), ["one"]);
    std::os::unix::fs::symlink(&path, &hidden).unwrap();
    assert!(NewSnapshot::begin(&path).is_err());
    assert_is(&path, "first");
}

/// It fails before the guest is frozen.
#[test]
fn a_mount_point_is_refused_first() {
    let line = format!(
        "{:#}",
        NewSnapshot::begin(Path::new("/proc")).err().unwrap()
    );
    assert!(line.contains("it is a mount point"), "{line}");
}

#[test]
fn a_trial_exchange_leaves_nothing() {
    let scratch = Scratch::new("trial");
    let path = scratch.0.join("one");
    write(&path, "first").unwrap();
    let new = NewSnapshot::begin(&path).unwrap();
    assert_eq!(fs::read_dir(&new.hidden).unwrap().count(), 0);
}
