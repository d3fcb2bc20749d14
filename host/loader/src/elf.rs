//! What a file says of itself before anybody opens it as a library: whether it is ELF, whole, and of this machine. It only
//! reads, and never runs anything of the file.

use std::{fs::File, io, path::Path};

use modalkit_abi::QUEUE_HANDSHAKE_SYMBOL;
use object::{
    Endianness, FileKind,
    elf::{self, FileHeader64},
    read::{
        ReadCache, ReadRef,
        elf::{FileHeader, ProgramHeader, SectionHeader},
    },
};

use crate::error::OpenError;

/// The machine this program was built for, as ELF numbers it.
#[cfg(target_arch = "x86_64")]
const MACHINE: u16 = elf::EM_X86_64;
#[cfg(target_arch = "aarch64")]
const MACHINE: u16 = elf::EM_AARCH64;

/// Bytes of a 64-bit ELF header: what is shorter may be the beginning of one.
const HEADER_BYTES: u64 = 64;
/// What every ELF file begins with.
const MAGIC: &[u8; 4] = b"\x7fELF";

/// Whether a file is all there, as far as it says: a library that is being copied in place ends before its own section
/// table does. What is no ELF file says nothing, and counts as whole once it is longer than a header.
///
/// # Errors
/// The file can't be read.
pub(crate) fn is_whole(file: &Path) -> io::Result<bool> {
    let file = File::open(file)?;
    let length = file.metadata()?.len();
    let cache = ReadCache::new(file);
    let begins_like_one = |length: u64| {
        cache.read_bytes_at(0, length.min(4)).is_ok_and(|start| MAGIC.starts_with(start) || start.is_empty())
    };
    if length < HEADER_BYTES {
        return Ok(!begins_like_one(length));
    }
    Ok(!matches!(read(&cache, length), Err(OpenError::Truncated { .. })))
}

/// Whether a file exports a queue backend rather than a pipeline. What isn't whole exports nothing.
///
/// # Errors
/// The file can't be opened.
pub(crate) fn exports_queue(file: &Path) -> io::Result<bool> {
    let symbol = QUEUE_HANDSHAKE_SYMBOL.strip_suffix(b"\0").unwrap_or(QUEUE_HANDSHAKE_SYMBOL);
    let cache = ReadCache::new(File::open(file)?);
    let exports = || -> Option<bool> {
        let header = FileHeader64::<Endianness>::parse(&cache).ok()?;
        let endian = header.endian().ok()?;
        let symbols = header.sections(endian, &cache).ok()?.symbols(endian, &cache, elf::SHT_DYNSYM).ok()?;
        Some(symbols.iter().any(|found| symbols.symbol_name(endian, found).is_ok_and(|name| name == symbol)))
    };
    Ok(exports().unwrap_or(false))
}

/// Checks what can be checked without the dynamic linker.
pub(crate) fn check(file: &Path) -> Result<(), OpenError> {
    let unreadable = |error: io::Error| OpenError::Unloadable { reason: error.to_string() };
    let file = File::open(file).map_err(unreadable)?;
    let length = file.metadata().map_err(unreadable)?.len();
    read(&ReadCache::new(file), length)
}

fn read(cache: &ReadCache<File>, length: u64) -> Result<(), OpenError> {
    let start = cache.read_bytes_at(0, length.min(16)).unwrap_or_default();
    if !start.starts_with(MAGIC) {
        return Err(OpenError::NotElf { found: describe(start) });
    }
    let truncated = |expected: u64| OpenError::Truncated { expected, found: length };
    if length < HEADER_BYTES {
        return Err(truncated(HEADER_BYTES));
    }
    match FileKind::parse(cache) {
        Ok(FileKind::Elf64) => {}
        Ok(FileKind::Elf32) => return Err(foreign("a 32-bit machine".into())),
        _ => return Err(OpenError::NotElf { found: describe(start) }),
    }
    let broken = |error: object::read::Error| OpenError::Unloadable { reason: error.to_string() };
    let header = FileHeader64::<Endianness>::parse(cache).map_err(broken)?;
    let endian = header.endian().map_err(broken)?;
    // Counts that don't fit their fields stand elsewhere in the file, and could be anything: no linker writes as many.
    if header.e_shnum(endian) == 0 || header.e_phnum(endian) == elf::PN_XNUM {
        return Err(OpenError::Unloadable {
            reason: "it has no table of sections that one could read".into(),
        });
    }
    // The table of sections is what a linker writes last.
    let sections_end = header
        .e_shoff(endian)
        .saturating_add(u64::from(header.e_shentsize(endian)) * u64::from(header.e_shnum(endian)));
    if sections_end > length {
        return Err(truncated(sections_end));
    }
    let machine = header.e_machine(endian);
    if machine != MACHINE || header.is_big_endian() != cfg!(target_endian = "big") {
        return Err(foreign(machine_name(machine)));
    }
    if header.e_type(endian) != elf::ET_DYN {
        return Err(OpenError::NotALibrary);
    }
    for segment in header.program_headers(endian, cache).map_err(broken)? {
        let end = segment.p_offset(endian).saturating_add(segment.p_filesz(endian));
        if end > length {
            return Err(truncated(end));
        }
    }
    let sections = header.sections(endian, cache).map_err(broken)?;
    for section in sections.iter().filter(|section| section.sh_type(endian) != elf::SHT_NOBITS) {
        let end = section.sh_offset(endian).saturating_add(section.sh_size(endian));
        if end > length {
            return Err(truncated(end));
        }
    }
    Ok(())
}

fn foreign(found: String) -> OpenError {
    OpenError::Architecture { found, expected: machine_name(MACHINE) }
}

fn machine_name(machine: u16) -> String {
    match machine {
        elf::EM_X86_64 => "x86-64".into(),
        elf::EM_AARCH64 => "AArch64".into(),
        elf::EM_RISCV => "RISC-V".into(),
        elf::EM_386 => "x86 (32 bits)".into(),
        elf::EM_ARM => "ARM (32 bits)".into(),
        elf::EM_PPC64 => "PowerPC".into(),
        elf::EM_S390 => "S/390".into(),
        other => format!("ELF machine {other}"),
    }
}

/// The first bytes, for people.
fn describe(start: &[u8]) -> String {
    let text: String = start.iter().map(|byte| char::from(*byte)).take(12).collect();
    match start {
        [] => "an empty file".into(),
        [b'M', b'Z', ..] => "a Windows program or library (MZ)".into(),
        [0xfe, 0xed, 0xfa, ..] | [0xce | 0xcf, 0xfa, 0xed, ..] => {
            "a macOS program or library (Mach-O)".into()
        }
        [b'!', b'<', b'a', b'r', ..] => "a static library (ar): the crate's type must be cdylib".into(),
        _ => format!("a file that begins with {text:?}"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn of_this_program() -> Vec<u8> {
        fs::read(std::env::current_exe().unwrap()).unwrap()
    }

    fn checked(bytes: &[u8]) -> (Result<(), OpenError>, bool) {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(&file, bytes).unwrap();
        (check(file.path()), is_whole(file.path()).unwrap())
    }

    #[test]
    fn a_file_is_whole_when_its_section_table_is() {
        let whole = of_this_program();
        assert!(matches!(checked(&whole), (Ok(()), true)));
        for length in [0, 1, 3, 40, 64, 5000, whole.len() / 2, whole.len() - 1] {
            let (checked, is_whole) = checked(&whole[..length]);
            assert!(!is_whole, "{length} bytes");
            assert!(checked.is_err(), "{length} bytes");
        }
        // Bytes behind what it needs are ignored.
        assert!(checked(&[whole, vec![0; 9]].concat()).1);
    }

    #[test]
    fn files_of_other_kinds_are_named() {
        let text = |bytes: &[u8]| checked(bytes).0.unwrap_err().to_string();
        assert!(text(b"").contains("an empty file"), "{}", text(b""));
        let words = text(b"this is no library, and long enough to be told from the beginning of one");
        assert!(words.contains("begins with \"this is no l\""), "{words}");
        assert!(text(&[b"MZ".as_slice(), &[0; 90]].concat()).contains("Windows"));
        let mut other = of_this_program();
        other[18] = 183;
        other[19] = 0;
        let other = text(&other);
        assert!(other.contains("AArch64") && other.contains("x86-64"), "{other}");
    }
}
