//! Consoles without input: a file, and nowhere.

use std::fs::File;
use std::io;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::fd::OwnedFd;
use rustix::io::Errno;

use super::Endpoint;
use crate::util::outfile::append;
use crate::util::output::write_whole;

/// Drops output.
pub(super) struct Nowhere;

impl Endpoint for Nowhere {
    fn write(&self, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn read(&self, _: &mut [u8], _: &OwnedFd) -> Result<usize, Errno> {
        Ok(0)
    }
}

/// Keeps output in a file.
pub(super) struct LogFile(File);

impl LogFile {
    /// Creates the file, or opens the one that is there to write at its end.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = append(path);
        let file = file.with_context(|| format!("Failed to open console file {path:?}"))?;
        Ok(Self(file))
    }
}

impl Endpoint for LogFile {
    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        write_whole(&self.0, bytes)
    }

    fn read(&self, _: &mut [u8], _: &OwnedFd) -> Result<usize, Errno> {
        Ok(0)
    }
}
