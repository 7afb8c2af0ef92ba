//! Fuzzes the frame decoder: any 64 bytes are a frame or an error, also with a valid prefix and checksum.
#![no_main]

use embarcadero_wire::{FRAME_BYTES, FRAME_MAGIC, Frame, WIRE_VERSION, crc32c};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: [u8; FRAME_BYTES]| {
    let mut bytes = bytes;
    let _ = Frame::decode(&bytes);
    bytes[..4].copy_from_slice(&FRAME_MAGIC.to_le_bytes());
    bytes[5] = WIRE_VERSION;
    let checksum = crc32c(&bytes[..60]);
    bytes[60..].copy_from_slice(&checksum.to_le_bytes());
    if let Ok(Frame::BatchHeader(header)) = Frame::decode(&bytes)
        && header.check(1 << 20).is_ok()
    {
        assert!(header.batch_bytes() <= 1 << 20);
    }
});
