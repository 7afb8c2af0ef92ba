//! Digests of layouts, computed at compile time, and masks of the bits that a layout leaves unused.

/// Start of a digest: the offset basis of 64-bit FNV-1a (draft-eastlake-fnv).
pub const DIGEST_SEED: u64 = 0xcbf2_9ce4_8422_2325;
const PRIME: u64 = 0x0100_0000_01b3;

/// Adds a name and a number to a digest: FNV-1a over the name and the eight bytes of the number.
#[must_use]
pub const fn digest(mut digest: u64, name: &str, number: u64) -> u64 {
    let name = name.as_bytes();
    let mut index = 0;
    while index < name.len() {
        digest = (digest ^ name[index] as u64).wrapping_mul(PRIME);
        index += 1;
    }
    // Ends the name, so that no name followed by a number looks like another.
    digest = (digest ^ 0xff).wrapping_mul(PRIME);
    let number = number.to_le_bytes();
    let mut index = 0;
    while index < number.len() {
        digest = (digest ^ number[index] as u64).wrapping_mul(PRIME);
        index += 1;
    }
    digest
}

/// Returns true for the name of a field that must be zero.
#[must_use]
pub const fn is_reserved(name: &str) -> bool {
    let (name, prefix) = (name.as_bytes(), "reserved".as_bytes());
    let mut index = 0;
    while index < prefix.len() {
        if index == name.len() || name[index] != prefix[index] {
            return false;
        }
        index += 1;
    }
    true
}

/// Adds `bytes` bytes from offset `at` to a mask over the eight words of a 64-byte structure.
#[must_use]
pub const fn with_bytes(mut mask: [u64; 8], at: usize, bytes: usize) -> [u64; 8] {
    let mut byte = at;
    while byte < at + bytes {
        mask[byte / 8] |= 0xff << (byte % 8 * 8);
        byte += 1;
    }
    mask
}

/// First byte of a 64-byte structure that is not zero under a mask, by its offset.
#[inline]
#[must_use]
pub fn first_set(words: &[u64; 8], mask: &[u64; 8]) -> Option<usize> {
    let set = words.iter().zip(mask).fold(0, |set, (word, mask)| set | word & mask);
    if set == 0 {
        return None;
    }
    let word = words.iter().zip(mask).position(|(word, mask)| word & mask != 0)?;
    Some(word * 8 + (words[word] & mask[word]).trailing_zeros() as usize / 8)
}

const _: () = assert!(cfg!(target_endian = "little"), "the formats are little-endian, and read in place");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_change_the_digest() {
        let all = [digest(DIGEST_SEED, "a", 1), digest(DIGEST_SEED, "b", 1), digest(DIGEST_SEED, "a", 1 << 40)];
        assert!(all[0] != all[1] && all[0] != all[2]);
        assert_ne!(digest(all[0], "a", 1), all[0]);
    }

    #[test]
    fn reserved_names_begin_with_the_word() {
        assert!(is_reserved("reserved") && is_reserved("reserved_low"));
        assert!(!is_reserved("reserve") && !is_reserved("log_reserved") && !is_reserved(""));
    }

    #[test]
    fn the_first_set_byte_is_found() {
        let mask = with_bytes([0; 8], 13, 3);
        let mut words = [u64::MAX; 8];
        words[1] = 0x0000_01ff_ffff_ffff;
        assert_eq!(first_set(&words, &mask), Some(13));
        words[1] = 0x00ff_0000_ffff_ffff;
        assert_eq!(first_set(&words, &mask), Some(14));
        words[1] = 0x0000_00ff_ffff_ffff;
        assert_eq!(first_set(&words, &mask), None);
    }
}
