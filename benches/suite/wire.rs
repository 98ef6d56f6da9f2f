//! The groups "blk" and "net": the guest measures its disk or its network itself
//! (benches/guest_io.rs).

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::contestants::{Contestant, Link};
use crate::figures::Figures;
use crate::measure::{Lab, run, tail};

/// Bytes of the disk. Its image is in L1's memory.
const DISK: u64 = 64 << 20;
/// The same as in the guest's program.
const STREAM: usize = 64 << 20;
const TRIPS: u32 = 2000;
/// The addresses of the host and the guest on the tap that scripts/bench made.
const HOST: &str = "10.99.0.1";
const GUEST: &str = "10.99.0.2/24";
const TAP: &str = "bench0";
const PORT: u16 = 9999;

pub(crate) fn blk(lab: &Lab, contestant: &Contestant, figures: &mut Figures) -> Result<()> {
    let image = lab.dir().join("disk.img");
    write_image(&image)?;
    let part = lab.part;
    let cmdline =
        format!("console=ttyS0 quiet panic=-1 rvmm.action=io rvmm.io={part},blk,/dev/vda");
    let mut job = lab.io(&cmdline);
    job.disk = Some(&image);
    if !contestant.can(&job) {
        return Ok(());
    }
    let (_, output) = run(contestant, &job)?;
    add(figures, contestant, &output, "")
}

/// Written completely, because holes would be faster.
fn write_image(path: &Path) -> Result<()> {
    if std::fs::metadata(path).is_ok_and(|metadata| metadata.len() == DISK) {
        return Ok(());
    }
    Ok(std::fs::write(path, vec![0xa5; usize::try_from(DISK)?])?)
}

pub(crate) fn net(lab: &Lab, contestant: &Contestant, figures: &mut Figures) -> Result<()> {
    let part = lab.part;
    for (vhost, suffix) in [(false, ""), (true, ", vhost")] {
        let words = format!("{part},net,{HOST},{PORT}");
        let cmdline =
            format!("console=ttyS0 quiet panic=-1 rvmm.action=io rvmm.net={GUEST} rvmm.io={words}");
        let mut job = lab.io(&cmdline);
        job.link = Some(Link { tap: TAP, vhost });
        if !contestant.can(&job) {
            return Ok(());
        }
        let listener = TcpListener::bind((HOST, PORT)).context("listen on the tap")?;
        let serving = std::thread::spawn(move || serve(&listener, part));
        let (_, output) = run(contestant, &job)?;
        add(figures, contestant, &output, suffix)?;
        serving.join().expect("the server does not panic")?;
    }
    Ok(())
}

/// The other end of the guest's streams.
fn serve(listener: &TcpListener, part: u32) -> Result<()> {
    let bytes = STREAM / usize::try_from(part)?;
    let (mut stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    let mut chunk = vec![0; 1 << 20];
    let mut left = bytes;
    while left > 0 {
        let count = stream.read(&mut chunk)?;
        ensure!(count > 0 && count <= left, "the guest's stream");
        left -= count;
    }
    stream.write_all(&[1])?;
    stream.read_exact(&mut [0])?;
    for _ in 0..bytes / chunk.len() {
        stream.write_all(&chunk)?;
    }
    let mut byte = [0];
    for _ in 0..TRIPS / part {
        stream.read_exact(&mut byte)?;
        stream.write_all(&byte)?;
    }
    Ok(())
}

/// Reads figures from lines "io: NAME UNIT VALUE".
fn add(figures: &mut Figures, contestant: &Contestant, output: &str, suffix: &str) -> Result<()> {
    let mut found = 0;
    for line in output.lines() {
        let Some(line) = line.trim_end().strip_prefix("io: ") else {
            continue;
        };
        let mut words = line.rsplitn(3, ' ');
        let (Some(value), Some(unit), Some(name)) = (words.next(), words.next(), words.next())
        else {
            continue;
        };
        let unit = if unit == "us" { "us" } else { "MB/s" };
        figures.add(
            &format!("{name}{suffix}"),
            unit,
            &contestant.name,
            value.parse()?,
        );
        found += 1;
    }
    ensure!(found > 0, "it wrote {:?}", tail(output));
    Ok(())
}
