//! Reasons for which a broker closes a connection, and the error frame that tells them.

use crate::codes;
use crate::frame::{ErrorFrame, FRAME_BYTES};

/// Most bytes of text behind an error frame.
pub const ERROR_TEXT_BYTES: usize = 1024;

codes! {
    /// Reason for which a broker closes a connection.
    pub enum ErrorCode: u32 {
        /// The bytes are not this protocol.
        BadFrame = 1,
        /// The topic does not exist, or is another incarnation.
        UnknownTopic = 2,
        /// The session belongs to another client, or is not open.
        UnknownSession = 3,
        /// The batch is too large, or its fields disagree with its body.
        BadBatch = 4,
        /// No memory came free in time.
        PoolExhausted = 5,
        /// The offset is not kept.
        OffsetOutOfRange = 6,
        /// The topic is being deleted.
        TopicDeleted = 7,
        /// The topic does not offer the acknowledgement level.
        AckLevel = 8,
        /// Stored bytes fail their check.
        Corrupt = 9,
        /// The broker is full, or is stopping.
        Unavailable = 10,
        /// The subscriber did not read in time.
        TooSlow = 11,
        /// The broker has no device for the requested transport.
        NoTransport = 12,
        /// Retention took batches that were to be acknowledged once they were replicated.
        NotReplicated = 13,
    }
}

/// Encodes an error frame and its text, which is cut at [`ERROR_TEXT_BYTES`].
#[must_use]
pub fn encode_error(code: ErrorCode, text: &str, detail: u64) -> Vec<u8> {
    let mut end = text.len().min(ERROR_TEXT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let text = &text.as_bytes()[..end];
    let frame = ErrorFrame { code: code.code(), text_bytes: text.len() as u32, detail, ..ErrorFrame::blank() };
    let mut bytes = Vec::with_capacity(FRAME_BYTES + text.len());
    bytes.extend_from_slice(&frame.encode());
    bytes.extend_from_slice(text);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_text_is_cut_at_a_character() {
        let long = "é".repeat(ERROR_TEXT_BYTES);
        let bytes = encode_error(ErrorCode::BadFrame, &long, 0);
        assert_eq!(bytes.len(), FRAME_BYTES + ERROR_TEXT_BYTES);
        assert!(std::str::from_utf8(&bytes[FRAME_BYTES..]).is_ok());
    }

    #[test]
    fn numbers_without_a_code_are_none() {
        assert!(ErrorCode::ALL.iter().all(|code| ErrorCode::from_code(code.code()) == Some(*code)));
        assert_eq!((ErrorCode::from_code(0), ErrorCode::from_code(14)), (None, None));
    }
}
