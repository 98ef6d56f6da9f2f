//! Consoles without input: a file, or none at all.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};

use super::{Ends, Sink};
use crate::util::outfile::append;
use crate::util::output::write_whole;

/// Drops output.
struct Nowhere;

/// Ends that drop output.
pub(super) fn nowhere() -> Ends {
    Ends {
        sink: Arc::new(Nowhere),
        source: None,
    }
}

impl Sink for Nowhere {
    fn write(&self, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

/// Appends output to a file.
struct LogFile(File);

/// Creates the file at `path`, or opens the existing one to append to it.
pub(super) fn file(path: &Path) -> Result<Ends> {
    let file = append(path);
    let file = file.with_context(|| format!("Failed to open console file {path:?}"))?;
    Ok(Ends {
        sink: Arc::new(LogFile(file)),
        source: None,
    })
}

impl Sink for LogFile {
    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        write_whole(&self.0, bytes)
    }
}
