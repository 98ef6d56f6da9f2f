//! Writes rvmm's man pages and shell completions, made from the flags that clap knows.
//!
//!     cli-docs DIR
//!
//! `scripts/docs` runs it.

use std::path::Path;
use std::process::ExitCode;
use std::{env, fs, io};

use clap::CommandFactory;
use clap_complete::{Shell, generate_to};
use rvmm::cli::Cli;

fn main() -> ExitCode {
    let Some(dir) = env::args_os().nth(1) else {
        eprintln!("cli-docs: usage: cli-docs DIR");
        return ExitCode::from(2);
    };
    match write_all(dir.as_ref()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cli-docs: Failed to write to {dir:?}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn write_all(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    // One page for rvmm, and one for each subcommand.
    clap_mangen::generate_to(Cli::command(), dir)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        generate_to(shell, &mut Cli::command(), "rvmm", dir)?;
    }
    Ok(())
}
