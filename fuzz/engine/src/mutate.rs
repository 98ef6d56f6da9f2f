//! Changes an input by several small steps.

use crate::rng::Rng;

/// The material for changes.
pub(crate) struct Material<'a> {
    /// Words of the initial inputs.
    pub(crate) words: &'a [Vec<u8>],
    /// Values that were compared.
    pub(crate) pairs: &'a [(u64, u64)],
    /// Another input.
    pub(crate) other: &'a [u8],
    /// The most bytes of an input.
    pub(crate) max_len: usize,
}

/// Changes `input` in up to eight ways.
pub(crate) fn mutate(input: &mut Vec<u8>, rng: &mut Rng, material: &Material) {
    for _ in 0..1 << rng.below(4) {
        match rng.below(12) {
            0 => flip(input, rng),
            1 => set_byte(input, rng),
            2 => insert(input, rng, material),
            3 => erase(input, rng),
            4 => copy(input, rng),
            5 => number(input, rng),
            6 | 7 => replace_compared(input, rng, material.pairs),
            8 | 9 => word(input, rng, material.words),
            10 => splice(input, rng, material.other),
            _ => digits(input, rng),
        }
        input.truncate(material.max_len);
    }
}

/// Values at which programs often behave differently.
const NUMBERS: [u64; 12] = [
    0,
    1,
    7,
    0x7f,
    0xff,
    0x1000,
    0x7fff_ffff,
    0xffff_ffff,
    1 << 59,
    (1 << 59) - 1,
    i64::MAX as u64,
    u64::MAX,
];

fn flip(input: &mut [u8], rng: &mut Rng) {
    let at = rng.below(input.len());
    if let Some(byte) = input.get_mut(at) {
        *byte ^= 1 << rng.below(8);
    }
}

fn set_byte(input: &mut [u8], rng: &mut Rng) {
    let at = rng.below(input.len());
    if let Some(byte) = input.get_mut(at) {
        *byte = rng.byte();
    }
}

/// Inserts a byte once or many times.
fn insert(input: &mut Vec<u8>, rng: &mut Rng, material: &Material) {
    let at = rng.below(input.len() + 1);
    let count = match rng.below(8) {
        0 => rng.below(material.max_len.min(256)),
        _ => 1,
    };
    let byte = rng.byte();
    input.splice(at..at, std::iter::repeat_n(byte, count));
}

/// A piece of an input, most often a small one.
fn piece(input: &[u8], rng: &mut Rng) -> std::ops::Range<usize> {
    let start = rng.below(input.len());
    let most = match rng.below(4) {
        0 => input.len(),
        _ => 16.min(input.len()),
    };
    let length = rng.below(most) + 1;
    start..(start + length).min(input.len())
}

fn erase(input: &mut Vec<u8>, rng: &mut Rng) {
    let piece = piece(input, rng);
    input.drain(piece);
}

/// Copies a piece of the input to another place, over the old bytes or between them.
fn copy(input: &mut Vec<u8>, rng: &mut Rng) {
    let bytes = input[piece(input, rng)].to_vec();
    put(input, rng, &bytes);
}

fn splice(input: &mut Vec<u8>, rng: &mut Rng, other: &[u8]) {
    let bytes = &other[piece(other, rng)];
    put(input, rng, bytes);
}

fn word(input: &mut Vec<u8>, rng: &mut Rng, words: &[Vec<u8>]) {
    if let Some(word) = rng.one_of(words) {
        put(input, rng, word);
    }
}

fn put(input: &mut Vec<u8>, rng: &mut Rng, bytes: &[u8]) {
    let at = rng.below(input.len() + 1);
    let over = match rng.below(2) {
        0 => 0,
        _ => bytes.len().min(input.len() - at),
    };
    input.splice(at..at + over, bytes.iter().copied());
}

/// Changes a number of 2, 4 or 8 bytes.
fn number(input: &mut [u8], rng: &mut Rng) {
    let value = match rng.below(4) {
        0 => 1 << rng.below(64),
        _ => NUMBERS[rng.below(NUMBERS.len())],
    };
    let size = 2 << rng.below(3);
    let at = rng.below(input.len());
    let bytes = value.to_le_bytes();
    for (byte, new) in input.iter_mut().skip(at).zip(&bytes[..size]) {
        *byte = *new;
    }
}

/// Changes a number in digits.
fn digits(input: &mut Vec<u8>, rng: &mut Rng) {
    let Some(start) = input.iter().position(u8::is_ascii_digit) else {
        return;
    };
    // The first one, or a later one.
    let from = start + rng.below(input.len() - start);
    let digit = input[from..].iter().position(u8::is_ascii_digit);
    let start = digit.map_or(start, |at| from + at);
    let length = input[start..].iter().take_while(|b| b.is_ascii_digit());
    let end = start + length.count();
    let value = match rng.below(3) {
        0 => rng.next() >> rng.below(64),
        _ => NUMBERS[rng.below(NUMBERS.len())],
    };
    input.splice(start..end, value.to_string().into_bytes());
}

/// Replaces one value of a comparison in the input by the other.
fn replace_compared(input: &mut [u8], rng: &mut Rng, pairs: &[(u64, u64)]) {
    let Some((one, other)) = rng.one_of(pairs) else {
        return;
    };
    let (old, new) = match rng.below(2) {
        0 => (*one, *other),
        _ => (*other, *one),
    };
    let size = [2, 4, 8]
        .into_iter()
        .find(|size| *size == 8 || (old | new) >> (8 * size) == 0);
    let size = size.unwrap_or(8);
    let (mut old, mut new) = (old.to_le_bytes(), new.to_le_bytes());
    if rng.below(4) == 0 {
        old[..size].reverse();
        new[..size].reverse();
    }
    let places: Vec<usize> = (0..input.len().saturating_sub(size - 1))
        .filter(|at| input[*at..at + size] == old[..size])
        .collect();
    if let Some(at) = rng.one_of(&places) {
        input[*at..at + size].copy_from_slice(&new[..size]);
    }
}
